"""The hinge loss on implicit rewards."""

from __future__ import annotations

import torch

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def hinge_loss(pair: PairLogps, *, beta: float) -> LossValues:
    """Penalise pairs whose scaled margin is below one.

        value = max(0, 1 - beta * (log-ratio of chosen - log-ratio of rejected))

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats: the margin aimed at is 1 / beta nats.
    Returns values (pairs,), unreduced; rewards are detached. Starts at 1.
    Raises LossInputError when reference logps are absent.
    Source: SLiC-HF, arXiv:2305.10425, with the log-ratio to the reference as RSO has it, arXiv:2309.06657.
    """
    chosen, rejected = pair_log_ratios(pair)
    values = torch.relu(1 - beta * (chosen - rejected))
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))
