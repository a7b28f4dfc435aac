"""Anchored preference optimisation, for chosen responses that are worse than the model's own."""

from __future__ import annotations

import torch

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def apo_down_loss(pair: PairLogps, *, beta: float) -> LossValues:
    """Lower both responses below the reference, the rejected one further.

        value = sigmoid(reward(chosen)) + 1 - sigmoid(reward(chosen) - reward(rejected)),
        reward(y) = beta * log-ratio of y

    At the start the chosen response does not move at all: its two slopes cancel. Once the margin is large, the anchor
    alone is left, and draws it down.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    Returns values (pairs,), unreduced, in (0, 2); rewards are detached. Starts at 1.
    Raises LossInputError when reference logps are absent.
    Source: D'Oosterlinck et al. 2024, eq. 8, arXiv:2408.06266.
    """
    chosen, rejected = pair_log_ratios(pair)
    # 1 - sigmoid(x) as sigmoid(-x): the difference loses every digit when the margin is large.
    values = torch.sigmoid(beta * chosen) + torch.sigmoid(beta * (rejected - chosen))
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))
