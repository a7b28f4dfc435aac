"""Alignment by optimal transport for pairs: margins are compared as distributions, not one by one."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(couples_batch=True)
def aot_loss(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossValues:
    """Raise the distribution of the policy's margins above that of the reference's: the k-th smallest meets the k-th.

        policy margin    = log policy(chosen|x) - log policy(rejected|x), the reference's likewise
        gap              = policy margin - the reference margin that has the same rank within the batch
        value            = -(1 - e) * log sigmoid(beta * gap) - e * log sigmoid(-beta * gap),   e = label_smoothing

    Sorting is optimal transport in one dimension. It is done within the batch that is given, so this loss must be
    handed the whole global batch at once (couples_batch). Where sorting changes nothing, as with one pair, it is DPO.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    label_smoothing: in [0, 0.5), the assumed share of labels that are the wrong way round.
    Returns values (pairs,), unreduced, in the order of the pairs; rewards are detached and those of DPO. Starts at
    log 2.
    Raises LossInputError when reference logps are absent.
    Source: Melnyk et al. 2024, the paired variant, arXiv:2406.05882.
    """
    chosen, rejected = pair_log_ratios(pair)
    assert pair.reference_chosen is not None and pair.reference_rejected is not None
    at = of_equal_rank(pair.reference_chosen - pair.reference_rejected, pair.policy_chosen - pair.policy_rejected)
    coupled = replace(pair, reference_chosen=pair.reference_chosen[at], reference_rejected=pair.reference_rejected[at])
    values = dpo_loss(coupled, beta=beta, label_smoothing=label_smoothing).values
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))


def of_equal_rank(values: Tensor, like: Tensor) -> Tensor:
    """(n,) int64: for each entry of `like`, where in `values` the one stands that is as many-th smallest there."""
    rank = like.argsort(stable=True).argsort(stable=True)
    return values.argsort(stable=True)[rank]
