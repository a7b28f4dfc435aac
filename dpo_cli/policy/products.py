"""Products with weights on a CPU, where torch's own way is not the fastest.

With AVX-512, large ones in float32 go through oneDNN, a part of every build of torch. torch takes them from MKL, which
leaves AVX-512 alone on processors that are not Intel's, and there reaches 60 to 80% of oneDNN's speed with the same
shapes; with AVX2 it is MKL that is faster, but for the logits of a wide vocabulary (docs/performance.md).

Without AVX-512, those in bfloat16 are made in float32 and rounded. torch then has no kernel for them but plain loops,
which are up to three hundred times as slow. GPUs have libraries of their own for all of this.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN makes a kernel for every new shape, which takes it half a millisecond: below this nothing is gained.
_LEAST_OPERATIONS = 2e8
# A product of fewer rows in bfloat16 takes less time than its weight takes to be widened.
_LEAST_ROWS = 4
# How many kernels oneDNN keeps: what a layer uses, forward and backward; with bfloat16 attention asks for many small
# ones.
_KEPT_KERNELS = {torch.float32: 8, torch.bfloat16: 96}
# It has no way to write where it is told to: results that are too large to be made twice are made in parts of so many
# columns and copied.
_PART = 4096
# MKL is at its best with so many columns at a time, and a quarter slower than oneDNN with a wide vocabulary's.
_MKL_PART = 1024
_WIDE = 32_768


def keep_few_kernels(dtype: torch.dtype) -> None:
    """How many kernels oneDNN keeps, for weights of this type; to be called before it has made one.

    A kernel is a megabyte or two of code for one shape, and packed rows hardly ever have the same length twice: of the
    1,024 that it keeps by default most are never used again, and take gigabytes after some hundred steps.
    """
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(_KEPT_KERNELS.get(dtype, max(_KEPT_KERNELS.values()))))


def teach_linear_layers(model: nn.Module, *, but: nn.Module) -> None:
    """Have a model's plain linear layers, all but one, compute what suits in these ways, where any could."""
    for module in model.modules():
        if type(module) is nn.Linear and module is not but and (_onednn_is_faster() or widens(module.weight)):
            module.__class__ = _Linear


def multiply_into(out: Tensor, inputs: Tensor, weight: Tensor) -> None:
    """out = inputs @ weight^T: (T, out) of (T, in) and (out, in); not differentiable."""
    if not (_suits(inputs, weight) or (len(weight) >= _WIDE and _can(inputs, weight))):
        width = _MKL_PART if weight.device.type == "cpu" else len(weight)
        for part in range(0, len(weight), width):
            torch.mm(inputs, weight[part : part + width].T, out=out[:, part : part + width])
        return
    for part in range(0, len(weight), _PART):
        out[:, part : part + _PART] = _product(inputs, weight[part : part + _PART])


def widens(states: Tensor) -> bool:
    """Whether products of these are made in float32."""
    return states.dtype == torch.bfloat16 and states.device.type == "cpu" and not _has_bfloat16()


def _gains_by_widening(inputs: Tensor, weight: Tensor) -> bool:
    """Not for so few rows that it would take longer to widen the weight."""
    return widens(weight) and inputs.dtype == weight.dtype and inputs.numel() >= _LEAST_ROWS * weight.shape[1]


@cache
def _has_bfloat16() -> bool:
    """Asked of an operator that is not public; without it torch's own products are as right."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or bool(asked())


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs @ weight^T + bias: (..., out) of (..., in) and (out, in); not differentiable."""
    if not widens(weight):
        return F.linear(inputs, weight, bias)
    out, wide = inputs.new_empty(*inputs.shape[:-1], len(weight)), inputs.float()
    # In parts, so that no second copy of a head's weights lives.
    for part in range(0, len(weight), _PART):
        columns = slice(part, part + _PART)
        out[..., columns] = F.linear(wide, weight[columns].float(), None if bias is None else bias[columns].float())
    return out


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """(T, out) of (T, in) and (in, out); not differentiable."""
    if not widens(right):
        return left @ right
    total = torch.zeros(len(left), right.shape[1])
    for first in range(0, len(left), _PART):
        rows = slice(first, first + _PART)
        for part in range(0, len(right), _PART):
            inner = slice(part, part + _PART)
            total[rows].addmm_(left[rows, inner].float(), right[inner].float())
    return total.to(right.dtype)


def _suits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product, and is faster."""
    return _onednn_is_faster() and _can(inputs, weight)


@cache
def _onednn_is_faster() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _can(inputs: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product, and it is worth a kernel."""
    return (
        weight.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and 2 * inputs.numel() * len(weight) >= _LEAST_OPERATIONS
        and _has_onednn()
    )


@cache
def _has_onednn() -> bool:
    # Not a public operator; without it torch's own products are as right.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs @ weight^T + bias: (..., out) of (..., in) and (out, in)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return found


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not _suits(input, self.weight) and not _gains_by_widening(input, self.weight):
            return super().forward(input)
        output: Tensor = _ProductWithGradients.apply(input, self.weight, self.bias)
        return output


class _ProductWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return linear(inputs, weight, bias) if widens(weight) else _product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        rows, its_grad = inputs.flatten(0, -2), grad.flatten(0, -2)
        if widens(weight):
            grad_inputs = matmul(its_grad, weight).view(inputs.shape) if wants_inputs else None
            grad_weight = matmul(its_grad.T, rows) if wants_weight else None
        else:
            grad_inputs = _product(grad, weight.T) if wants_inputs else None
            grad_weight = _weight_gradient(its_grad, rows) if wants_weight else None
        return grad_inputs, grad_weight, its_grad.sum(0) if wants_bias else None


def _weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """grad^T @ rows: (out, in) of (T, out) and (T, in).

    oneDNN wants the left factor turned over in memory, which pays where that is by far the narrower of the two.
    """
    if 2 * grad.shape[1] <= rows.shape[1]:
        return _product(grad.T.contiguous(), rows.T)
    if 2 * rows.shape[1] <= grad.shape[1]:
        return _product(rows.T.contiguous(), grad.T).T.contiguous()
    return grad.T @ rows
