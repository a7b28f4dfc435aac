"""Self-play preference optimisation with hard labels: both log-ratios are drawn to a fixed distance."""

from __future__ import annotations

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def sppo_hard_loss(pair: PairLogps, *, beta: float) -> LossValues:
    """Draw the chosen log-ratio to 1 / (2 beta) and the rejected one to -1 / (2 beta), each on its own.

        value = (log-ratio of chosen - 1 / (2 beta)) ** 2 + (log-ratio of rejected + 1 / (2 beta)) ** 2

    The paper's win probability, which a preference model gives, is 1 for the chosen and 0 for the rejected response.

    pair: summed logps in nats, each (pairs,).
    beta: > 0, in 1/nats, the paper's 1 / eta: 1 / (2 beta) nats are aimed at. The paper has 1e-3, TRL 0.1.
    Returns values (pairs,), in nats squared, unreduced; rewards are detached. Starts at 1 / (2 beta**2).
    Raises LossInputError when reference logps are absent.
    Source: Wu et al. 2024, eq. 4.7, arXiv:2405.00675.
    """
    chosen, rejected = pair_log_ratios(pair)
    aim = 0.5 / beta
    values = (chosen - aim).square() + (rejected + aim).square()
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))
