"""Gated feed-forward networks keep less, and give what the model's own give; others are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import kept_by_autograd
from torch import Tensor, nn
from transformers import Gemma2Config, Phi3Config, Qwen2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from dpo_cli.policy.gated import _SiLUProduct, teach_gated_networks

HIDDEN, WIDTH, ROWS = 24, 40, 17


def network(dtype: torch.dtype = torch.float32, **changes: Any) -> Qwen2MLP:
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=HIDDEN, intermediate_size=WIDTH, **changes)
    return Qwen2MLP(config).to(dtype)


def is_taught(module: nn.Module) -> bool:
    return "forward" in vars(module)


def results(module: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    output = module(x)
    output.backward(slope)
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("frozen", [(), ("gate_proj",), ("up_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_outputs_and_gradients_are_bit_for_bit_the_model_s(dtype: torch.dtype, frozen: tuple[str, ...]) -> None:
    plain, taught = network(dtype), network(dtype)
    for each in (plain, taught):
        for name in frozen:
            getattr(each, name).requires_grad_(False)
    teach_gated_networks(taught)
    assert is_taught(taught)
    x, slope = (torch.randn(1, ROWS, HIDDEN).to(dtype) for _ in range(2))
    found, wanted = results(taught, x, slope), results(plain, x, slope)
    assert len(found) == len(wanted) == 5 - len(frozen)
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_slopes_are_those_of_finite_differences(wants: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=each) for each in wants)
    assert torch.autograd.gradcheck(_SiLUProduct.apply, (gate, up))


def test_three_inner_activations_are_kept_instead_of_four() -> None:
    def kept(module: nn.Module) -> int:
        tensors = kept_by_autograd(lambda: module(torch.randn(1, ROWS, HIDDEN, requires_grad=True)))
        return sum(tensor.shape[-1] == WIDTH and tensor.numel() == ROWS * WIDTH for tensor in tensors)

    module = network()
    assert kept(module) == 4
    teach_gated_networks(module)
    assert kept(module) == 3


def test_without_gradients_the_numbers_are_the_same() -> None:
    module, x = network(), torch.randn(2, ROWS, HIDDEN)
    before = module(x)
    teach_gated_networks(module)
    with torch.inference_mode():
        assert torch.equal(module(x), before)


class _Scaled(Qwen2MLP):
    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = 2 * super().forward(x)
        return scaled


class _AsksForMore(Qwen2MLP):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.hidden_size
        return output


@pytest.mark.parametrize(
    "module",
    [
        network(hidden_act="gelu"),
        _Scaled(Qwen2Config(hidden_size=HIDDEN, intermediate_size=WIDTH)),
        _AsksForMore(Qwen2Config(hidden_size=HIDDEN, intermediate_size=WIDTH)),
        Gemma2MLP(Gemma2Config(hidden_size=HIDDEN, intermediate_size=WIDTH)),
        Phi3MLP(Phi3Config(hidden_size=HIDDEN, intermediate_size=WIDTH, pad_token_id=0)),
        nn.Linear(HIDDEN, HIDDEN),
    ],
    ids=lambda module: type(module).__name__,
)
def test_networks_that_compute_something_else_are_left_alone(module: nn.Module) -> None:
    teach_gated_networks(module)
    assert not is_taught(module)


def test_a_forward_that_somebody_has_replaced_stays() -> None:
    module = network()
    mine = module.forward = lambda x: x  # type: ignore[method-assign, assignment, return-value]
    teach_gated_networks(module)
    assert module.forward is mine
