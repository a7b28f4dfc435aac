"""Noise contrastive alignment for pairs: each response against the reference, not only against the other."""

from __future__ import annotations

import torch.nn.functional as F

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def nca_pair_loss(pair: PairLogps, *, beta: float) -> LossValues:
    """Tell both responses from samples of the reference, so that the chosen one does not become less likely.

        reward(y) = beta * log(policy(y|x) / reference(y|x))
        value     = -log sigmoid(reward(chosen)) - 1/2 log sigmoid(-reward(chosen)) - 1/2 log sigmoid(-reward(rejected))

    The chosen reward has a finite aim, log 2; the rejected one falls without end.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    Returns values (pairs,), unreduced; rewards are detached. Starts at 2 log 2.
    Raises LossInputError when reference logps are absent.
    Source: Chen et al. 2024, InfoNCA and NCA, arXiv:2402.05369.
    """
    chosen, rejected = (beta * ratio for ratio in pair_log_ratios(pair))
    values = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return LossValues(values, (chosen.detach(), rejected.detach()))
