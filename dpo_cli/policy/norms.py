"""On a CPU, a model's RMSNorms in float32 with a backward pass of their own.

Written out in small operations, as models have it, the backward pass of a norm goes over its row a dozen times and the
forward pass keeps it three times; this goes over it half as often and keeps the input alone, which the residual stream
has anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Models name it differently.
_EPSILONS = ("variance_epsilon", "eps")
_PROBED_ROWS = 3


def teach_norms(model: nn.Module) -> None:
    """Have every norm of a model that computes x / sqrt(mean(x^2) + eps) * weight in float32 do so in one operation.

    A norm is taken by what it computes, on a few random rows: others, such as those that scale by 1 + weight, are left
    as they are.
    """
    for module in model.modules():
        epsilon = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
        weight = getattr(module, "weight", None)
        if epsilon is None or weight is None or getattr(module, "bias", None) is not None:
            continue
        if weight.dtype == torch.float32 and weight.ndim == 1 and len(weight) and _is_plain(module, weight, epsilon):
            module.forward = partial(_forward, module, epsilon)


def _is_plain(module: nn.Module, weight: Tensor, epsilon: float) -> bool:
    # Small rows, so that an epsilon that is used otherwise shows.
    rows = 1e-2 * torch.randn(_PROBED_ROWS, len(weight), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.allclose(module(rows), _normalised(rows, weight, epsilon)[0], rtol=1e-5, atol=1e-7)


def _forward(module: nn.Module, epsilon: float, hidden_states: Tensor) -> Tensor:
    """hidden_states: (..., d)."""
    weight: Any = module.weight
    if not torch.is_grad_enabled():
        return _normalised(hidden_states, weight, epsilon)[0]
    output: Tensor = _RMSNorm.apply(hidden_states, weight, epsilon)
    return output


def _normalised(inputs: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """With the reciprocal of each row's root mean square: (..., d) and (..., 1)."""
    norm = torch.linalg.vector_norm(inputs, dim=-1, keepdim=True)
    reciprocal = norm.square_().div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
    return (inputs * reciprocal).mul_(weight), reciprocal


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        output, reciprocal = _normalised(inputs, weight, epsilon)
        ctx.save_for_backward(inputs, weight, reciprocal)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With n = x / rms: weight' = sum(grad n), x' = (grad weight - n mean(grad weight n)) / rms."""
        inputs, weight, reciprocal = ctx.saved_tensors
        normed = inputs * reciprocal
        products = (grad * normed).flatten(0, -2)
        grad_weight = products.sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        means = (products @ weight).div_(len(weight)).view(reciprocal.shape)
        grad_inputs = (grad * weight).addcmul_(normed, means, value=-1).mul_(reciprocal)
        return grad_inputs, grad_weight, None
