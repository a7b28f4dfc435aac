"""Anchored preference optimisation, for chosen responses that are better than the model's own."""

from __future__ import annotations

import torch

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def apo_zero_loss(pair: PairLogps, *, beta: float) -> LossValues:
    """Raise the chosen response above the reference and lower the rejected one below it, each on its own.

        value = 1 - sigmoid(reward(chosen)) + sigmoid(reward(rejected)),   reward(y) = beta * log-ratio of y

    Unlike DPO it is not content with a margin: a chosen response that becomes less likely is penalised.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    Returns values (pairs,), unreduced, in (0, 2); rewards are detached. Starts at 1.
    Raises LossInputError when reference logps are absent.
    Source: D'Oosterlinck et al. 2024, eq. 7, arXiv:2408.06266.
    """
    chosen, rejected = pair_log_ratios(pair)
    # 1 - sigmoid(x) as sigmoid(-x): the difference loses every digit when the reward is large.
    values = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))
