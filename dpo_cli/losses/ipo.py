"""Identity preference optimisation: a squared loss that aims at a finite margin."""

from __future__ import annotations

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def ipo_loss(pair: PairLogps, *, beta: float, average_logps: bool = True) -> LossValues:
    """Draw the difference of the log-ratios to 1 / (2 beta), and no further.

        value = (log-ratio of chosen - log-ratio of rejected - 1 / (2 beta)) ** 2

    pair: summed logps in nats, each (pairs,).
    beta: > 0, the paper's tau: 1 / (2 beta) is the difference aimed at, in nats per token (nats if summed).
    average_logps: divide each log-ratio by its response's token count. The default, because a squared loss on sums
        weighs a pair by the square of its length, and because the authors of the paper told the maintainers of TRL that
        its results were obtained in this form. False is eq. 17 as printed, for which the theory holds.
    Returns values (pairs,), unreduced; rewards are detached and in the loss's own units (averaged if it averages).
    Starts at 1 / (4 beta**2).
    Raises LossInputError when reference logps are absent.
    Source: Azar et al. 2023, eq. 17, arXiv:2310.12036.
    """
    chosen, rejected = pair_log_ratios(pair, average_logps=average_logps)
    values = (chosen - rejected - 1 / (2 * beta)).square()
    return LossValues(values, ((beta * chosen).detach(), (beta * rejected).detach()))
