"""Findings on what becomes of chosen and rejected responses. Each is a pure function; docs/health.md explains them."""

from __future__ import annotations

from dpo_cli.health.curves import Curves, Finding, Setup, Severity, shift

# A fall of the chosen log-prob is told from so many nats and this share of its size at the start: of less than a nat
# nobody's samples change, and over hundreds of tokens a few nats are no more than drift.
_FALL_NATS, _FALL_SHARE = 1.0, 0.05
# From here on the chosen responses have lost half of what the start knew of them, as measured in log-prob.
_DEEP_FALL_NATS, _DEEP_FALL_SHARE = 5.0, 0.5
# Chosen responses that have fallen by this share of the rejected ones' fall are not being told apart from them.
_TOGETHER = 0.7
# The gradient of -log sigmoid(m) is sigmoid(-m), about the loss itself where that is small: at 0.02 a pair has 4% of
# the weight that it began with.
_SATURATED_LOSS, _SATURATED_ACCURACY = 0.02, 0.98
# A held-out loss this far above its own lowest is no noise of a few hundred pairs.
_HELD_OUT_RISE = 0.1
# Below this share a ranking is a coin's to the eye; below the second it is turned round. Of so many pairs the standard
# error of an accuracy at one half is 1.6 points.
_CHANCE, _INVERTED = 0.53, 0.44
_PAIRS_TO_JUDGE = 1000
# Margins closer to zero than this say that the policy has hardly moved, which is another finding.
_MOVED = 0.01
# A reference that differs from the policy at its start by more than a nat a response is no matter of rounding.
_MISMATCH_NATS = 1.0


def chosen_falling(curves: Curves, setup: Setup) -> Finding | None:
    """Preference training has made chosen responses clearly less likely than they were."""
    if setup.loss == "sft_ref":
        return None
    chosen, rejected = shift(curves, setup, "chosen"), shift(curves, setup, "rejected")
    size = curves.at_start("logps/chosen")
    if chosen is None or rejected is None or size is None:
        return None
    fall = -chosen
    if fall < max(_FALL_NATS, _FALL_SHARE * abs(size)):
        return None
    deep = fall >= max(_DEEP_FALL_NATS, _DEEP_FALL_SHARE * abs(size))
    together = rejected < 0 and fall > _TOGETHER * -rejected
    hold = (*_stronger_pull(setup), f"optimizer.lr={setup.lr / 3:.3g}")
    if deep and together:
        why = "both fall together: the policy drifts away from all it knew, beyond what preferences ask"
        remedies = hold
    elif deep:
        why = "this far, pushing rejected responses down takes the chosen ones along"
        remedies = _imitation(setup) + hold
    else:
        why = "often normal: the loss sees only the difference of the two, and both share words"
        remedies = _imitation(setup)
    return Finding(
        Severity.WARNING if deep else Severity.NOTE,
        f"log-probs of chosen responses have fallen by {fall:.1f} nats from {-abs(size):.1f}, of rejected ones by "
        f"{-rejected:.1f}",
        why,
        remedies,
    )


def margins_saturated(curves: Curves, setup: Setup) -> Finding | None:
    """The training pairs are all but decided, so hardly any gradient is left."""
    loss, accuracy = curves.steady(setup.preference_loss), curves.steady("rewards/accuracies")
    margin = curves.steady("rewards/margins")
    if not setup.is_logistic or loss is None or accuracy is None or margin is None:
        return None
    if loss > _SATURATED_LOSS or accuracy < _SATURATED_ACCURACY:
        return None
    held_out, lowest = curves.evaluated("loss"), curves.lowest_evaluated_loss
    worse = held_out is not None and lowest is not None and held_out > lowest + _HELD_OUT_RISE
    smoothing = ("loss.label_smoothing=0.1",) if setup.parameters.get("label_smoothing") == 0 else ()
    return Finding(
        Severity.WARNING if worse else Severity.NOTE,
        f"{accuracy:.1%} of training pairs are ranked right by a margin of {margin:.1f} on average; loss {loss:.2g}",
        "a decided pair has next to no gradient, so further steps teach little"
        + (f", and held-out loss rose from {lowest:.3f} to {held_out:.3f}: learnt by heart" if worse else ""),
        (f"max_steps={curves.step}", *smoothing, "loss=ipo"),
    )


def accuracy_at_chance(curves: Curves, setup: Setup) -> Finding | None:
    """Training pairs, which a first epoch shows for the first time, are ranked no better than by a coin."""
    for lines in range(5, 41, 5):
        steps = curves.steps(lines)
        if steps is None or curves.step - steps < setup.warmup_steps:
            return None
        if steps * setup.global_pairs >= _PAIRS_TO_JUDGE:
            break
    else:
        return None
    accuracy, margins = curves.steady("rewards/accuracies", lines), curves.recent("rewards/margins", lines)
    if accuracy is None or accuracy > _CHANCE or max(map(abs, margins), default=0.0) < _MOVED:
        return None
    inverted = accuracy < _INVERTED
    return Finding(
        Severity.ALARM if inverted else Severity.WARNING,
        f"{accuracy:.1%} of training pairs are ranked right over the last {steps} steps, after warm-up",
        "most pairs are ranked the wrong way round: each step undoes the last, or the policy is breaking"
        if inverted
        else "nothing carries over from pair to pair: noisy labels, responses cut too early, or steps too large",
        (f"optimizer.lr={setup.lr / 10:.3g}", "loss=robust_dpo", "data.on_long=drop"),
    )


def reference_mismatch(curves: Curves, setup: Setup) -> Finding | None:
    """Before the first step the policy is already far from the reference that was named for it."""
    nats = setup.nats_per_reward
    chosen, rejected = curves.before_training("rewards/chosen"), curves.before_training("rewards/rejected")
    if nats is None or chosen is None or rejected is None:
        return None
    furthest = max(chosen, rejected, key=abs) * nats
    if abs(furthest) < _MISMATCH_NATS:
        return None
    return Finding(
        Severity.WARNING,
        f"before the first step the policy differs from its reference by {abs(furthest):.1f} nats a response",
        "the loss begins by pulling the policy towards or away from another model: right only if that model was meant "
        f"(model.reference={setup.reference or 'start'})",
        ("model.reference=start",),
    )


def _imitation(setup: Setup) -> tuple[str, ...]:
    """What holds chosen responses up; a loss that has such a term and uses it can use it more."""
    for name, else_zero in (("nll_alpha", 1.0), ("desirable_weight", 2.0)):
        if name in setup.parameters:
            return (f"loss.{name}={2 * setup.parameters[name] or else_zero:.3g}",)
    return ("loss=dpo loss.nll_alpha=1",)


def _stronger_pull(setup: Setup) -> tuple[str, ...]:
    return () if setup.beta is None else (f"loss.beta={setup.beta * 3:.3g}",)
