"""The same numbers on a GPU. Run where there is one: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY, build, examples, plain_logps, save, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_cli.batch.layout import pack, sum_by_response
from dpo_cli.policy.load import load_model
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.self_test import packed_self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"),
]
NAMES = ["qwen2", "qwen3", "llama", "mistral-sliding", "phi3", "gemma3", "olmo2", "qwen3-moe", "granite", "phi"]
ROWS = examples(responses=4, count=8)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 keeps three digits; this file compares five."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("name", NAMES)
def test_float32_on_the_gpu_agrees_with_the_cpu(name: str) -> None:
    row = pack(ROWS)
    on_cpu, on_gpu = build(name, dtype=torch.float32), build(name, dtype=torch.float32).cuda()
    wanted, found = PackedModel(on_cpu)(row), PackedModel(on_gpu)(row)
    assert found.logps.device.type == "cuda"
    assert (found.logps.cpu() - wanted.logps).abs().max() < 1e-4
    wanted.logps.sum().backward()
    found.logps.sum().backward()
    for (parameter, p), (_, q) in zip(on_cpu.named_parameters(), on_gpu.named_parameters(), strict=True):
        if p.grad is not None and p.grad.abs().max() > 1e-6:
            assert ((q.grad.cpu() - p.grad).abs().max() / p.grad.abs().max()) < 1e-3, parameter


@pytest.mark.parametrize("name", NAMES)
def test_bf16_on_the_gpu_agrees_with_float32_on_the_cpu_within_bf16_s_digits(name: str) -> None:
    """Both from the same bf16 weights, so that only the arithmetic differs."""
    row = pack(ROWS)
    model = build(name, dtype=torch.bfloat16)
    found = PackedModel(build(name, dtype=torch.bfloat16).cuda())(row).logps.cpu()
    wanted = PackedModel(model.float())(row).logps
    assert found.dtype == torch.float32
    assert (found - wanted).abs().mean() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_bf16_packed_is_as_close_to_float32_as_a_plain_bf16_forward_is(name: str) -> None:
    model = build(name, dtype=torch.bfloat16).cuda()
    exact = torch.cat(plain_logps(build(name, dtype=torch.bfloat16).float(), ROWS))
    with torch.no_grad():
        plain = torch.cat(plain_logps(model, ROWS)).cpu()
        packed = PackedModel(model)(pack(ROWS)).logps.cpu()
    assert (packed - exact).abs().mean() < 1.5 * (plain - exact).abs().mean() + 0.01


@pytest.mark.parametrize("name", NAMES)
def test_policy_and_reference_agree_to_the_bit_at_step_0(name: str) -> None:
    packed, row = PackedModel(build(name, dtype=torch.bfloat16).cuda()), pack(ROWS)
    with torch.no_grad():
        reference = sum_by_response(row.to(packed.device), packed(row).logps)
    policy = sum_by_response(row.to(packed.device), packed(row).logps)
    # index_add on a GPU may add in any order: float64 sums of float32 values still agree to 1e-12.
    assert (policy - reference).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_self_test_passes_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    packed_self_test(PackedModel(build(name, dtype=dtype).cuda()), vocabulary=VOCABULARY, where=name)


def test_a_model_is_loaded_onto_the_gpu_in_bf16_by_default(tmp_path: Path) -> None:
    loaded = load_model(settings(save(tmp_path), dtype="auto"), device=torch.device("cuda"), seed=0)
    assert loaded.model.device.type == "cuda"
    assert loaded.dtype == torch.bfloat16


def test_gradient_checkpointing_with_lora_trains_on_the_gpu(tmp_path: Path) -> None:
    chosen = settings(
        save(tmp_path),
        dtype="bfloat16",
        gradient_checkpointing=True,
        lora={"rank": 4, "alpha": 8.0, "target_modules": "all-linear", "merge": True},
    )
    loaded = load_model(chosen, device=torch.device("cuda"), seed=0)
    PackedModel(loaded.model)(pack(ROWS)).logps.sum().backward()
    moved = [p for name, p in loaded.model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in moved)


@pytest.mark.parametrize("name", ["qwen2", "llama", "mistral-sliding"])
def test_grouped_queries_run_on_fused_kernels_alone(name: str) -> None:
    """The plain kernel keeps every score of every head in float32: gigabytes a layer for long rows."""
    packed = PackedModel(build(name, dtype=torch.bfloat16).cuda())
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused):
        packed(pack(ROWS)).logps.sum().backward()
