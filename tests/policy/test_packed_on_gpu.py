"""The same numbers on a GPU. Run where there is one: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY, build, examples, plain_logps, save, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpo_cli.batch.layout import pack, sum_by_response
from dpo_cli.policy.attention_routes import PLAIN, AttentionRoute, choose_attention
from dpo_cli.policy.load import load_model
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.self_test import packed_self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"),
]
GPU = torch.device("cuda")
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


def test_checkpoints_in_host_memory_change_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for offload in (False, True):
        chosen = settings(
            save(tmp_path / str(offload)), dtype="float32", gradient_checkpointing=True, offload_checkpoints=offload
        )
        loaded = load_model(chosen, device=GPU, seed=0)
        loaded.packed()(pack(ROWS)).logps.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loaded.model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


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


@pytest.fixture(params=["flash", "varlen", "flex"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    return str(request.param)


def route(kernel: str, name: str) -> AttentionRoute:
    return choose_attention(kernel, build(name).config, device=GPU, dtype=torch.bfloat16)


WIDE = ["qwen3", "qwen3-moe"]


@pytest.mark.parametrize("name", ["qwen2", "qwen2-sliding", "mistral-sliding", "gemma3", "deepseek-v3", *WIDE])
def test_every_kernel_is_as_close_to_float32_as_the_plain_route_is(kernel: str, name: str) -> None:
    if kernel == "flex" and name not in WIDE:
        pytest.skip("FlexAttention has no heads as narrow as these")
    row, exact = pack(ROWS), build(name, dtype=torch.bfloat16).float()
    wanted = PackedModel(exact)(row).logps
    wanted.sum().backward()
    largest = {key: p.grad for key, p in exact.named_parameters() if p.grad is not None}
    errors = {}
    for way in (PLAIN, route(kernel, name)):
        model = build(name, dtype=torch.bfloat16).cuda()
        found = PackedModel(model, attention=way)(row).logps
        found.sum().backward()
        of_logps = (found.cpu() - wanted).abs().mean().item()
        of_gradients = sum(
            ((p.grad.cpu().float() - largest[key]).norm() / largest[key].norm()).item()
            for key, p in model.named_parameters()
            if key in largest and largest[key].norm() > 1e-6
        )
        errors[way.name] = (of_logps, of_gradients)
    plain, other = errors.values()
    assert other[0] < 1.5 * plain[0] + 0.01
    assert other[1] < 1.5 * plain[1] + 0.1


def test_a_kernel_scores_the_same_row_to_the_same_bits_with_and_without_gradients(kernel: str) -> None:
    packed = PackedModel(build("qwen3", dtype=torch.bfloat16).cuda(), attention=route(kernel, "qwen3"))
    row = pack(ROWS)
    with torch.no_grad():
        reference = packed(row).logps
    assert torch.equal(packed(row).logps, reference)


def test_a_kernel_works_under_gradient_checkpointing(kernel: str) -> None:
    model = build("qwen3", dtype=torch.bfloat16).cuda()
    packed, row, gradients = PackedModel(model, attention=route(kernel, "qwen3")), pack(ROWS), []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        packed(row).logps.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()


def test_auto_takes_one_call_a_layer_and_says_which() -> None:
    chosen = choose_attention("auto", build("qwen2").config, device=GPU, dtype=torch.bfloat16)
    assert chosen.name in ("packed-flash", "packed-varlen", "packed-flex")
    assert chosen.told is not None and "one call a layer" in chosen.told


def test_float32_stays_on_the_plain_route_and_says_why() -> None:
    chosen = choose_attention("auto", build("qwen2").config, device=GPU, dtype=torch.float32)
    assert chosen.name == "packed-sdpa"
    assert chosen.told is not None and "float32" in chosen.told


@pytest.mark.parametrize("name", NAMES)
def test_the_self_test_passes_with_whatever_auto_takes(name: str) -> None:
    model = build(name, dtype=torch.bfloat16).cuda()
    chosen = choose_attention("auto", model.config, device=GPU, dtype=torch.bfloat16)
    packed_self_test(PackedModel(model, attention=chosen), vocabulary=VOCABULARY, where=name)
