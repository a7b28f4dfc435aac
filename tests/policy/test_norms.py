"""RMSNorms with a backward pass of their own: numbers are those of the model's, and other norms are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from dpo_cli.policy.norms import teach_norms

WIDTH = 48


def random_norm(dtype: torch.dtype = torch.float32) -> Qwen2RMSNorm:
    norm = Qwen2RMSNorm(WIDTH, eps=1e-4).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def is_taught(norm: nn.Module) -> bool:
    return "forward" in vars(norm)


def gradients(norm: Any, inputs: Tensor, slope: Tensor) -> list[Tensor | None]:
    inputs = inputs.detach().requires_grad_()
    output = norm(inputs)
    output.backward(slope)
    return [output.detach(), inputs.grad, norm.weight.grad]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 37, WIDTH), (5, WIDTH), (1, 7, 3, WIDTH)])
def test_outputs_and_gradients_are_those_of_float64(shape: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    norm = random_norm()
    exact = Qwen2RMSNorm(WIDTH, eps=1e-4).double()
    exact.load_state_dict(norm.state_dict())
    # transformers' module rounds to float32 within; torch's own function does not.
    exact.forward = lambda inputs: functional.rms_norm(inputs, (WIDTH,), exact.weight, 1e-4)  # type: ignore[method-assign]
    inputs, slope = scale * torch.randn(shape), torch.randn(shape)
    teach_norms(norm)
    assert is_taught(norm)
    for found, wanted in zip(
        gradients(norm, inputs, slope), gradients(exact, inputs.double(), slope.double()), strict=True
    ):
        assert found is not None and wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_slopes_are_those_of_finite_differences() -> None:
    from dpo_cli.policy.norms import _RMSNorm

    torch.manual_seed(0)
    inputs, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda a, b: _RMSNorm.apply(a, b, 1e-3), (inputs, weight))


def test_without_gradients_nothing_is_kept() -> None:
    norm, inputs = random_norm(), torch.randn(3, WIDTH)
    before = norm(inputs)
    teach_norms(norm)
    with torch.no_grad():
        output = norm(inputs)
    assert not output.requires_grad
    torch.testing.assert_close(output, before)


@pytest.mark.parametrize(("wants_inputs", "wants_weight"), [(True, False), (False, True)])
def test_only_gradients_that_are_wanted_are_computed(wants_inputs: bool, wants_weight: bool) -> None:
    norm, inputs = random_norm(), torch.randn(3, WIDTH, requires_grad=wants_inputs)
    teach_norms(norm)
    norm.weight.requires_grad_(wants_weight)
    norm(inputs).sum().backward()
    assert (inputs.grad is not None) == wants_inputs and (norm.weight.grad is not None) == wants_weight


@pytest.mark.parametrize(
    "norm",
    [
        Gemma3RMSNorm(WIDTH),
        nn.LayerNorm(WIDTH),
        nn.LayerNorm(WIDTH, bias=False),
        random_norm(torch.bfloat16),
        random_norm(torch.float64),
        nn.Linear(WIDTH, WIDTH),
    ],
    ids=lambda norm: f"{type(norm).__name__}-{norm.weight.dtype}",
)
def test_what_computes_something_else_is_left_alone(norm: nn.Module) -> None:
    teach_norms(norm)
    assert not is_taught(norm)


def test_torch_s_own_is_taught_too() -> None:
    norm = nn.RMSNorm(WIDTH, eps=1e-5)
    teach_norms(norm)
    assert is_taught(norm)
