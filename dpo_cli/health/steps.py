"""Findings on steps that are too large, too small or uneven. Each is a pure function; docs/health.md explains them."""

from __future__ import annotations

import math
from statistics import median

from dpo_cli.health.curves import STEADY_LINES, Curves, Finding, Setup, Severity, shift

# Share of its start that the accuracy of chosen tokens may lose. Healthy runs stay within 3%, since most tokens of a
# response are decided by spelling and grammar, which preferences leave alone.
_TOKENS_LOST, _TOKENS_GONE = 0.1, 0.3
# A policy that predicts fewer tokens than this at its start has no language to lose.
_LANGUAGE = 0.3
# Steps after warm-up in which any useful learning rate has moved a margin by a hundredth.
_PATIENCE_STEPS = 50
_UNMOVED_MARGIN, _UNMOVED_LOSS = 0.01, 0.005
# So many times ln 2: wrong pairs cost tens each. Not of a policy that has moved further than this in nats a response.
_OVERCONFIDENT_LOSS, _BARELY_MOVED_NATS = 5 * math.log(2), 2.0
# A norm this many times the median of the lines before it; the norms of healthy runs vary by a factor of three.
_SPIKE = 10.0
_LINES_FOR_MEDIAN = 10
# So many spikes among the latest lines are no accident of one batch.
_SPIKES_THAT_RECUR = 3


def policy_collapsed(curves: Curves, setup: Setup) -> Finding | None:
    """The policy no longer knows the tokens of chosen responses, which it knew at the start."""
    start, now = curves.at_start("mean_token_accuracy"), curves.steady("mean_token_accuracy", 2)
    if start is None or start < _LANGUAGE or now is None or now > start * (1 - _TOKENS_LOST):
        return None
    return Finding(
        Severity.ALARM if now < start * (1 - _TOKENS_GONE) else Severity.WARNING,
        f"the most probable token is the chosen response's at {now:.1%} of places, and was at {start:.1%}",
        f"the policy is losing its language, not its preferences: optimizer.lr={setup.lr:.3g} is too large for it"
        + ("" if setup.beta is None else f", or loss.beta={setup.beta:.3g} too weak a pull towards the reference"),
        (f"optimizer.lr={setup.lr / 10:.3g}", *(() if setup.beta is None else (f"loss.beta={setup.beta * 3:.3g}",))),
    )


def loss_at_ln2(curves: Curves, setup: Setup) -> Finding | None:
    """The margin is still what it was before the first step."""
    steps = curves.steps(STEADY_LINES)
    loss, margin = curves.steady(setup.preference_loss), curves.steady("rewards/margins")
    if not setup.is_logistic or steps is None or loss is None or margin is None:
        return None
    early = curves.step - steps < setup.warmup_steps + _PATIENCE_STEPS
    if early or abs(margin) > _UNMOVED_MARGIN or abs(loss - math.log(2)) > _UNMOVED_LOSS:
        return None
    still = curves.steady("grad_norm") == 0.0
    return Finding(
        Severity.WARNING,
        f"after {curves.step} steps the loss is {loss:.4f}, ln 2 is 0.6931, and the margin {margin:+.4f}",
        "no gradient reaches the weights"
        if still
        else f"steps are too small to move the policy: optimizer.lr={setup.lr:.3g}",
        (f"optimizer.lr={setup.lr * 10:.3g}",),
    )


def beta_too_large(curves: Curves, setup: Setup) -> Finding | None:
    """The policy has hardly moved, and its rewards are so spread that wrong pairs cost tens."""
    loss, beta = curves.steady(setup.preference_loss), setup.beta
    chosen, rejected = shift(curves, setup, "chosen"), shift(curves, setup, "rejected")
    if not setup.is_logistic or loss is None or not beta or chosen is None or rejected is None:
        return None
    moved = max(abs(chosen), abs(rejected))
    if loss < _OVERCONFIDENT_LOSS or moved > _BARELY_MOVED_NATS or setup.reference is not None:
        return None
    return Finding(
        Severity.WARNING,
        f"the loss is {loss:.1f}, {loss / math.log(2):.0f} times what knowing nothing costs, though log-probs have "
        f"moved by {moved:.1f} nats only",
        f"loss.beta={beta:.3g} makes a verdict of a fraction of a nat: pairs have all of the gradient or none",
        (f"loss.beta={beta / 10:.3g}",),
    )


def gradient_spikes(curves: Curves, setup: Setup) -> Finding | None:
    """A gradient norm far above those before it; of a step that was logged, others may have had one unseen."""
    norms = curves.recent("grad_norm")
    spikes = [
        (norms[at] / typical, typical)
        for at in range(max(_LINES_FOR_MEDIAN, len(norms) - _LINES_FOR_MEDIAN), len(norms))
        if norms[at] > _SPIKE * (typical := median(norms[:at])) > 0
    ]
    if not spikes:
        return None
    times, typical = max(spikes)
    clip = () if (setup.max_grad_norm or math.inf) <= typical else (f"optimizer.max_grad_norm={typical:.2g}",)
    recurs = len(spikes) >= _SPIKES_THAT_RECUR
    return Finding(
        Severity.WARNING if recurs else Severity.NOTE,
        f"the gradient norm was {times * typical:.3g}, {times:.0f} times the median of earlier lines, {typical:.3g}",
        "single batches outweigh the others: odd or very long rows, or a policy about to break"
        if recurs
        else "one batch with odd or very long rows; clipping bounds what it does to the weights",
        (*clip, f"optimizer.lr={setup.lr / 3:.3g}"),
    )
