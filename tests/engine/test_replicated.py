"""The engine moves weights as a plain optimiser would, in float32 whatever the model's dtype, and can be put back."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from dpo_cli.engine.interface import OPTIMIZER, WEIGHTS, OptimizerSettings
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.errors import CheckpointError, ConfigError

ADAMW = OptimizerSettings(name="adamw", weight_decay=0.1, max_grad_norm=None)
RMSPROP = OptimizerSettings(name="rmsprop", weight_decay=0.0, max_grad_norm=None)


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 4, generator=generator).to(next(model.parameters()).dtype)
    return model(inputs).square().mean()


def train(engine: ReplicatedEngine, model: nn.Module, steps: range, learning_rate: float = 1e-2) -> None:
    for step in steps:
        loss = loss_of(model, step)
        engine.backward(loss)
        assert engine.step(learning_rate, loss).sound


def weights_of(engine: ReplicatedEngine) -> dict[str, torch.Tensor]:
    return {saved.name: saved.tensor for saved in engine.saved_tensors() if saved.group == WEIGHTS}


def moments_of(engine: ReplicatedEngine) -> dict[str, torch.Tensor]:
    return {saved.name: saved.tensor for saved in engine.saved_tensors() if saved.group == OPTIMIZER}


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        (ADAMW, lambda groups: torch.optim.AdamW(groups, lr=1e-2)),
        (RMSPROP, lambda groups: torch.optim.RMSprop(groups, lr=1e-2)),
    ],
)
def test_a_step_is_the_textbook_optimisers_step(settings, build) -> None:
    ours, theirs = small_model(), small_model()
    engine = ReplicatedEngine(ours, ours, settings)
    train(engine, ours, range(5))
    optimizer = build(
        [
            {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
    )
    for step in range(5):
        optimizer.zero_grad()
        loss_of(theirs, step).backward()
        optimizer.step()
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-5, atol=1e-6)


def test_bf16_weights_move_at_a_learning_rate_they_could_not_feel_themselves() -> None:
    model = small_model(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    engine = ReplicatedEngine(model, model, OptimizerSettings(name="adamw", weight_decay=0.0, max_grad_norm=None))
    masters = {name: tensor.clone() for name, tensor in weights_of(engine).items()}
    train(engine, model, range(1), learning_rate=5e-7)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)), "too small for bf16"
    assert any(not torch.equal(tensor, masters[name]) for name, tensor in weights_of(engine).items())
    train(engine, model, range(1, 200), learning_rate=1e-5)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights_of(engine)[name].bfloat16())


def test_bf16_gradients_accumulate_in_float32() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    engine = ReplicatedEngine(model, model, ADAMW)
    shares = [1.0, *([2.0**-9] * 64)]
    for share in shares:
        engine.backward((model.weight * share).sum())
    # In bf16, 1 + 2^-9 is 1 again: all 64 small shares would be lost.
    assert engine.step(0.0, torch.zeros(())).gradient_norm == pytest.approx(sum(shares), rel=1e-6)


def test_clipping_scales_the_gradient_to_the_limit() -> None:
    model, reference = small_model(), small_model()
    settings = OptimizerSettings(name="rmsprop", weight_decay=0.0, max_grad_norm=1e-3, eps=1.0, alpha=0.0)
    engine = ReplicatedEngine(model, model, settings)
    loss = loss_of(model, 0)
    engine.backward(loss)
    norm = engine.step(1.0, loss).gradient_norm
    loss_of(reference, 0).backward()
    scale = 1e-3 / (norm + 1e-6)
    for moved, old in zip(model.parameters(), reference.parameters(), strict=True):
        gradient = old.grad * scale
        torch.testing.assert_close(moved, old - gradient / (gradient.abs() + 1.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [ADAMW, RMSPROP])
def test_a_restored_engine_goes_on_bit_for_bit(settings: OptimizerSettings, dtype: torch.dtype) -> None:
    straight = small_model(dtype)
    engine = ReplicatedEngine(straight, straight, settings)
    train(engine, straight, range(3))
    weights = {name: tensor.clone() for name, tensor in weights_of(engine).items()}
    moments = {name: tensor.clone() for name, tensor in moments_of(engine).items()}
    train(engine, straight, range(3, 6))

    resumed = small_model(dtype)
    other = ReplicatedEngine(resumed, resumed, settings)
    other.load(weights, moments)
    train(other, resumed, range(3, 6))
    for name, tensor in weights_of(engine).items():
        assert torch.equal(tensor, weights_of(other)[name])
    for name, tensor in moments_of(engine).items():
        assert torch.equal(tensor, moments_of(other)[name])


def test_8_bits_without_their_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    model = small_model()
    with pytest.raises(ConfigError, match="torchao") as caught:
        ReplicatedEngine(model, model, replace(ADAMW, state_bits=8))
    assert "dpo-cli[8bit]" in str(caught.value.hint)


@pytest.mark.slow
def test_moments_of_8_bits_follow_those_of_32_and_are_restored_bit_for_bit() -> None:
    pytest.importorskip("torchao", reason='torchao is not installed: pip install "dpo-cli[8bit]"')
    runs = []
    for bits in (32, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 3))
        engine = ReplicatedEngine(model, model, replace(ADAMW, state_bits=bits))  # type: ignore[arg-type]
        train(engine, model, range(3))
        runs.append((model, engine, {name: tensor.clone() for name, tensor in weights_of(engine).items()}))
    (_, exact, wanted), (_, engine, weights) = runs
    for name, tensor in wanted.items():
        assert (weights[name] - tensor).norm() < 0.05 * tensor.norm()
    moments = {name: tensor.clone() for name, tensor in moments_of(engine).items()}
    # Only the matrix of 128 x 64 is large enough for blocks.
    assert {name for name, tensor in moments.items() if tensor.dtype == torch.uint8} == {
        "2.weight/exp_avg.codes", "2.weight/exp_avg_sq.codes",
    }  # fmt: skip
    assert engine.saved_bytes < exact.saved_bytes

    resumed = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 3))
    other = ReplicatedEngine(resumed, resumed, replace(ADAMW, state_bits=8))
    other.load(weights, moments)
    train(engine, runs[1][0], range(3, 6))
    train(other, resumed, range(3, 6))
    for found in (weights_of, moments_of):
        for name, tensor in found(engine).items():
            assert torch.equal(tensor, found(other)[name]), name


def test_frozen_parameters_are_left_alone_and_left_out() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    engine = ReplicatedEngine(model, model, ADAMW)
    assert set(weights_of(engine)) == {"2.weight", "2.bias"}


def test_another_models_checkpoint_is_refused() -> None:
    model = small_model()
    engine = ReplicatedEngine(model, model, ADAMW)
    with pytest.raises(CheckpointError, match=r"0\.bias"):
        engine.load({"0.weight": torch.zeros(3, 3)}, {})


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_what_is_not_finite_moves_nothing(factor: float) -> None:
    model = small_model()
    engine = ReplicatedEngine(model, model, ADAMW)
    train(engine, model, range(1))
    before = {saved.name: saved.tensor.clone() for saved in engine.saved_tensors()}
    loss = loss_of(model, 1)
    engine.backward(loss * factor)
    assert not engine.step(1e-2, loss).sound
    engine.backward(loss_of(model, 2))
    assert not engine.step(1e-2, loss.detach() * factor).sound
    assert all(torch.equal(saved.tensor, before[saved.name]) for saved in engine.saved_tensors())
    assert all(parameter.grad is None for parameter in model.parameters())
