"""Findings on a policy that is its own generator (loss=pdpo). Each is a pure function; docs/health.md explains them."""

from __future__ import annotations

from dpo_cli.health.curves import Curves, Finding, Setup, Severity

# A generator's metrics are means over few samples, so more lines than elsewhere make one judgement.
_LINES = 5
# Less than one sample in fifty below its truth: the hinge's gradient is zero on all others.
_INACTIVE = 0.02
# The generator's weighted term against DPO's: beyond this it is what is trained.
_OUTWEIGHS = 10.0
# A term that has grown so many times over feeds on itself.
_GROWN = 3.0
# Shares of the start. Of a few hundred samples, half of which end, the rate itself is known to a tenth; lengths of a
# healthy run vary by a tenth from line to line.
_EOS_LOST, _EOS_GONE = 0.2, 0.5
_DRIFT, _LARGE_DRIFT = 0.3, 1.0
# Nats a token that the samples' log-probs have left the reference's behind by. Responses of a chat model differ by
# hundredths; at a tenth, a response of 200 tokens is e^20 times as likely as it was.
_KL, _LARGE_KL = 0.1, 0.5


def generator_inactive(curves: Curves, setup: Setup) -> Finding | None:
    """The generator's term has nothing to work on."""
    eos, active = curves.steady("generator/eos_rate", _LINES), curves.steady("generator/active_fraction", _LINES)
    if eos == 0.0 and not setup.keeps_cut:
        return Finding(
            Severity.WARNING,
            f"no sample has ended within {setup.max_new_tokens} tokens, so the generator's term is empty",
            "samples that are cut are left out of the loss, which makes this run plain DPO",
            (f"rollout.max_new_tokens={2 * setup.max_new_tokens}",),
        )
    if setup.parameters.get("generator") != "hinge" or active is None or active > _INACTIVE:
        return None
    return Finding(
        Severity.NOTE,
        f"{active:.1%} of the policy's samples are ranked below their ground truth",
        "the hinge is zero for all others: discriminator and policy agree, and sampling teaches nothing for its time",
        ("rollout.samples_per_prompt=4", "loss.generator=unhinged", "loss.gamma=0"),
    )


def generator_runs_away(curves: Curves, setup: Setup) -> Finding | None:
    """The generator's term outweighs the preference term that it should accompany."""
    own, preference = curves.steady("loss/generator", _LINES), curves.steady("loss/dpo", _LINES)
    gamma, began = setup.parameters.get("gamma"), curves.opening("loss/generator")
    if own is None or not preference or began is None or not gamma:
        return None
    times = gamma * abs(own) / preference
    if times < _OUTWEIGHS:
        return None
    grows = abs(own) > _GROWN * abs(began)
    return Finding(
        Severity.ALARM if grows else Severity.WARNING,
        f"the generator's term, {gamma * own:.3g}, is {times:.0f} times DPO's; loss/generator was {began:.3g} at the "
        f"start and is {own:.3g}",
        f"loss.gamma={gamma:.3g} makes the policy chase its own samples, and preferences hardly steer it",
        (f"loss.gamma={gamma / 10:.3g}", f"loss.beta={(setup.beta or 0) * 3:.3g}"),
    )


def eos_rate_falling(curves: Curves, setup: Setup) -> Finding | None:
    """Fewer samples end by themselves than at the start."""
    began, now = curves.opening("generator/eos_rate"), curves.steady("generator/eos_rate", _LINES)
    if not began or now is None or now > began * (1 - _EOS_LOST):
        return None
    whole = ("rollout.keep_cut=false",) if setup.keeps_cut else ()
    return Finding(
        Severity.ALARM if now < began * (1 - _EOS_GONE) else Severity.WARNING,
        f"{now:.1%} of samples end within {setup.max_new_tokens} tokens, and {began:.1%} did at the start",
        "the policy forgets to stop: it was moved too far, or learns from samples that were cut",
        (*whole, *_weaker_generator(setup), f"optimizer.lr={setup.lr / 3:.3g}"),
    )


def length_drift(curves: Curves, setup: Setup) -> Finding | None:
    """The policy's samples have become much longer or shorter."""
    began, now = curves.opening("generator/length"), curves.steady("generator/length", _LINES)
    if not began or now is None or 1 / (1 + _DRIFT) < now / began < 1 + _DRIFT:
        return None
    longer = now > began
    large = now > began * (1 + _LARGE_DRIFT) or now < began / (1 + _LARGE_DRIFT)
    return Finding(
        Severity.WARNING if large else Severity.NOTE,
        f"samples have {now:.0f} tokens on average, and had {began:.0f} at the start",
        "chosen responses that are merely longer teach length; normal where better answers need more room"
        if longer
        else "the policy cuts its answers short; normal where chosen responses are the shorter ones",
        (*_weaker_generator(setup), f"optimizer.lr={setup.lr / 3:.3g}"),
    )


def kl_large(curves: Curves, setup: Setup) -> Finding | None:
    """The policy's own samples are far more likely than the reference finds them."""
    kl, length = curves.steady("generator/kl", _LINES), curves.steady("generator/length", _LINES)
    if kl is None or not length or kl < _KL * length:
        return None
    return Finding(
        Severity.ALARM if kl > _LARGE_KL * length else Severity.WARNING,
        f"KL(policy, reference) is about {kl:.1f} nats a sample, {kl / length:.2f} a token",
        "the policy writes what the reference would hardly write; what the pairs say of such text is a guess",
        (*(() if setup.beta is None else (f"loss.beta={setup.beta * 3:.3g}",)), f"optimizer.lr={setup.lr / 3:.3g}"),
    )


def _weaker_generator(setup: Setup) -> tuple[str, ...]:
    gamma = setup.parameters.get("gamma")
    return (f"loss.gamma={gamma / 3:.3g}",) if gamma else ()
