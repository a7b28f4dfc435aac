"""Alignment by optimal transport, unpaired: all chosen responses of a batch against all rejected ones."""

from __future__ import annotations

from dataclasses import replace

from dpo_cli.losses.aot import of_equal_rank
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(couples_batch=True)
def aot_unpaired_loss(pair: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossValues:
    """Raise the distribution of chosen log-ratios above that of rejected ones: the k-th smallest meets the k-th.

        gap   = log-ratio of chosen - the log-ratio of the rejected response that has the same rank within the batch
        value = -(1 - e) * log sigmoid(beta * gap) - e * log sigmoid(-beta * gap),   e = label_smoothing

    Which rejected response stands beside which chosen one in the data does not matter. Sorting is done within the batch
    that is given, so this loss must be handed the whole global batch at once (couples_batch). Of one pair it is DPO.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    label_smoothing: in [0, 0.5), the assumed share of labels that are the wrong way round.
    Returns values (pairs,), unreduced, in the order of the chosen responses; rewards are detached and those of DPO.
    Starts at log 2.
    Raises LossInputError when reference logps are absent.
    Source: Melnyk et al. 2024, the unpaired variant, arXiv:2406.05882.
    """
    chosen, rejected = pair_log_ratios(pair)
    assert pair.reference_rejected is not None
    at = of_equal_rank(rejected, chosen)
    coupled = replace(pair, policy_rejected=pair.policy_rejected[at], reference_rejected=pair.reference_rejected[at])
    values = dpo_loss(coupled, beta=beta, label_smoothing=label_smoothing).values
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))
