"""Kahneman-Tversky optimisation: single responses with a verdict, no pairs."""

from __future__ import annotations

import torch

from dpo_cli.losses.log_ratios import log_ratio
from dpo_cli.losses.types import LossValues, UnpairedLogps, declare


@declare(couples_batch=True)
def kto_loss(
    unpaired: UnpairedLogps, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LossValues:
    """Move desirable responses above, and undesirable ones below, the policy's average drift from the reference.

        kl    = max(0, mean over the batch of log(policy(y'|x) / reference(y'|x))),  y' a response to another prompt
        value = desirable_weight   * (1 - sigmoid(beta * (log-ratio - kl)))      where desirable
                undesirable_weight * (1 - sigmoid(beta * (kl - log-ratio)))      elsewhere

    No gradient flows through kl. It is a mean over the batch it is given, so this loss must be handed the whole global
    batch at once (couples_batch), never a micro-batch.

    unpaired: summed logps in nats, each (examples,). beta > 0, in 1/nats.
    desirable_weight, undesirable_weight: > 0; the authors advise to choose them so that desirable_weight * (number
        of desirable examples) is 1 to 4/3 times undesirable_weight * (number of undesirable ones).
    Returns values (examples,), unreduced; rewards (examples,) are detached; part kl repeats the batch's estimate.
    Starts at half the weight.
    Raises LossInputError when reference logps are absent.
    Source: Ethayarajh et al. 2024, eq. 7 and 8, arXiv:2402.01306.
    """
    ratio = log_ratio(unpaired.policy, unpaired.reference)
    kl = log_ratio(unpaired.kl_policy, unpaired.kl_reference).detach().mean().clamp(min=0)
    gain = beta * (ratio - kl)
    # 1 - sigmoid(x) as sigmoid(-x), exact in both tails.
    values = torch.where(
        unpaired.desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    )
    return LossValues(values, (beta * ratio).detach(), {"kl": kl.expand_as(values)})
