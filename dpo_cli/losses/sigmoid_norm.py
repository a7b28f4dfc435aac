"""DPO of nats per token, under the name that TRL has for it."""

from __future__ import annotations

from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def sigmoid_norm_loss(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossValues:
    """Length-normalised DPO: `dpo` with average_logps.

        reward(y) = beta * log(policy(y|x) / reference(y|x)) / tokens(y)
        value     = -log sigmoid(reward(chosen) - reward(rejected)), smoothed as in DPO

    pair: summed logps in nats, each (pairs,). beta: > 0, in tokens/nat; 5 in Tülu 3, far above DPO's because rewards
        are averages.
    label_smoothing: in [0, 0.5), the assumed share of labels that are the wrong way round.
    Returns values (pairs,), unreduced; rewards are detached. Starts at log 2.
    Raises LossInputError when reference logps are absent.
    Source: Tülu 3, which names it length-normalised DPO, arXiv:2411.15124.
    """
    return dpo_loss(pair, beta=beta, label_smoothing=label_smoothing, average_logps=True)
