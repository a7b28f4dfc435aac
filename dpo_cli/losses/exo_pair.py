"""EXO for pairs: the reverse of the divergence that DPO minimises."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dpo_cli.errors import LossInputError
from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def exo_pair_loss(pair: PairLogps, *, beta: float, label_smoothing: float) -> LossValues:
    """Match the policy's choice between two responses to the label's, seeking the mode where DPO covers the mean.

        margin = beta * (log-ratio of chosen - log-ratio of rejected)
        q      = sigmoid(margin),  how probable the policy holds the label to be
        value  = q * log(q / (1 - e)) + (1 - q) * log((1 - q) / e),   e = label_smoothing

    This is KL(policy's choice || smoothed label); smoothed DPO is KL(smoothed label || policy's choice) plus a
    constant. Both have their minimum at margin = log((1 - e) / e), here with the value 0.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    label_smoothing: in (0, 0.5), how uncertain a label is; without it every other choice is infinitely wrong. The
        paper has 1e-3.
    Returns values (pairs,), unreduced; rewards are detached. Starts at -log(e * (1 - e)) / 2 - log 2, 2.761 at 1e-3.
    Raises LossInputError when reference logps are absent or label_smoothing is not inside (0, 0.5).
    Source: Ji et al. 2024, eq. 16, arXiv:2402.00856.
    """
    if not 0 < label_smoothing < 0.5:
        raise LossInputError(
            f"label_smoothing is {label_smoothing}; EXO divides by it.",
            hint="loss.label_smoothing=1e-3 (above 0, below 0.5)",
        )
    chosen, rejected = pair_log_ratios(pair)
    margin = beta * (chosen - rejected)
    right = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return LossValues(right + wrong, ((beta * chosen).detach(), (beta * rejected).detach()))
