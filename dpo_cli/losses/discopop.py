"""DiscoPOP: a blend of the logistic and the exponential loss that a language model found by search."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def discopop_loss(pair: PairLogps, *, beta: float, tau: float = 0.05) -> LossValues:
    """DPO's loss where the pair is still ranked wrongly, an exponential one where it is ranked rightly.

        margin = beta * (log-ratio of chosen - log-ratio of rejected)
        s      = sigmoid(margin / tau)
        value  = -(1 - s) * log sigmoid(margin) + s * exp(-margin)

    It is not convex: just below a margin of 0 is a dip, in which a few pairs stay.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats; the paper has 0.05.
    tau: in (0, 1], in units of the margin: how abruptly the one gives way to the other. Above 1 the exponential would
        outgrow its weight.
    Returns values (pairs,), unreduced; rewards are detached. Starts at (1 + log 2) / 2.
    Raises LossInputError when reference logps are absent.
    Source: Lu et al. 2024, eq. 5, arXiv:2406.08414.
    """
    chosen, rejected = pair_log_ratios(pair)
    margin = beta * (chosen - rejected)
    logistic = -torch.sigmoid(-margin / tau) * F.logsigmoid(margin)
    # As one exponential: alone, exp(-margin) overflows where its weight is zero.
    exponential = torch.exp(F.logsigmoid(margin / tau) - margin)
    return LossValues(logistic + exponential, ((beta * chosen).detach(), (beta * rejected).detach()))
