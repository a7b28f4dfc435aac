"""DPO that is unbiased when a known share of the labels is flipped."""

from __future__ import annotations

import torch.nn.functional as F

from dpo_cli.errors import LossInputError
from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def robust_dpo_loss(pair: PairLogps, *, beta: float, label_smoothing: float) -> LossValues:
    """DPO whose expectation over flipped labels is the loss on clean labels.

        margin = beta * (log-ratio of chosen - log-ratio of rejected)
        value  = (-(1 - e) * log sigmoid(margin) + e * log sigmoid(-margin)) / (1 - 2 e),   e = label_smoothing

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    label_smoothing: in [0, 0.5), the share of labels believed to be flipped. Unlike in conservative DPO the second
        term is subtracted, so values can be negative and have no lower bound.
    Returns values (pairs,), unreduced; rewards are detached. Starts at log 2.
    Raises LossInputError when reference logps are absent or label_smoothing is not below one half.
    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise LossInputError(
            f"label_smoothing is {label_smoothing}; robust DPO divides by 1 - 2 * label_smoothing.",
            hint="loss.label_smoothing=0.1 (from 0 up to, not including, 0.5)",
        )
    chosen, rejected = pair_log_ratios(pair)
    margin = beta * (chosen - rejected)
    noisy = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return LossValues(noisy / (1 - 2 * label_smoothing), ((beta * chosen).detach(), (beta * rejected).detach()))
