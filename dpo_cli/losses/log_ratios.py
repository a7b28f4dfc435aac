"""The log-ratio of policy to reference, which most preference losses are functions of; computed in one place."""

from __future__ import annotations

from torch import Tensor

from dpo_cli.errors import LossInputError
from dpo_cli.losses.types import PairLogps


def log_ratio(policy: Tensor, reference: Tensor | None) -> Tensor:
    """log(policy / reference) of each response, in nats: the implicit reward divided by beta.

    policy, reference: log-probs of one shape. Returns that shape.
    Raises LossInputError when the reference is absent, or of another shape (which would broadcast silently).
    """
    if reference is None:
        raise LossInputError(
            "This loss compares the policy with a reference, but no reference log-probs were given.",
            hint="a loss that needs none: loss=simpo, loss=orpo, loss=sft_ref, or loss=dpo loss.reference_free=true",
        )
    if reference.shape != policy.shape:
        raise LossInputError(
            f"Policy log-probs have shape {tuple(policy.shape)}, reference log-probs {tuple(reference.shape)}."
        )
    return policy - reference


def pair_log_ratios(pair: PairLogps, *, average_logps: bool = False) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) log-ratios, each (pairs,), in nats, or in nats per token with average_logps."""
    chosen = log_ratio(pair.policy_chosen, pair.reference_chosen)
    rejected = log_ratio(pair.policy_rejected, pair.reference_rejected)
    if average_logps:
        return chosen / pair.chosen_tokens, rejected / pair.rejected_tokens
    return chosen, rejected
