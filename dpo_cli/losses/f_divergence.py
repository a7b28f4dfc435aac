"""What a response scores under an f-divergence from the reference; the log-ratio of plain DPO is one case."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# exp of it is finite in float32 and in bfloat16, and so is the loss made of it.
_LARGEST_EXPONENT = 80.0


def f_score(
    log_ratio: Tensor,
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"],
    *,
    alpha: float,
) -> Tensor:
    """f'(u) of u = policy / reference, where f is the divergence that holds the policy to the reference.

        reverse_kl        log u
        forward_kl        1 - 1 / u
        js_divergence     log(2 u / (1 + u))
        alpha_divergence  (u ** (alpha - 1) - 1) / (alpha - 1),   reverse_kl at alpha = 1, forward_kl at alpha = 0

    beta * f'(u) is the implicit reward, up to a constant of the prompt. Each vanishes at u = 1, with slope 1 (1/2 for
    js_divergence) in log u.

    log_ratio: log u in nats. alpha: in [0, 1]. Returns the same shape; finite: below a log-ratio of
    -80 / (1 - alpha) the scores of forward_kl and alpha_divergence no longer fall.
    Source: Wang et al. 2023, arXiv:2309.16240, where alpha stands for 1 - alpha; constants that cancel are left out.
    """
    if f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha_divergence": alpha - 1.0}[f_divergence]
    # What is left of the power at 1e-6 is below rounding, and dividing by it would not be.
    if abs(power) < 1e-6:
        return log_ratio
    return torch.expm1((power * log_ratio).clamp(max=_LARGEST_EXPONENT)) / power
