"""Large float32 products on a CPU: what oneDNN gives is what torch's own product gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import build, examples, kept_by_autograd
from torch import Tensor, nn

from dpo_cli.batch.layout import pack
from dpo_cli.policy import products
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.products import multiply_into, teach_linear_layers


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What this processor is like is asked in every test, and after the last."""
    asked = (products._onednn_is_faster, products._has_onednn, products._has_bfloat16)
    for each in asked:
        each.cache_clear()
    yield
    for each in asked:
        each.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of weights, or of what stands in their place, that oneDNN was asked for, as if there were AVX-512."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    shapes: list[tuple[int, ...]] = []
    plain = products._product

    def told(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return plain(inputs, weight, bias)

    monkeypatch.setattr(products, "_product", told)
    return shapes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(300, 320), (160, 640), (640, 160)])
def test_outputs_and_gradients_are_those_of_float64(
    asked: list[tuple[int, ...]], columns: int, rows: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(columns, rows, bias=bias))
    oracle = nn.Linear(columns, rows, bias=bias, dtype=torch.float64)
    oracle.load_state_dict(layer[0].state_dict())
    teach_linear_layers(layer, but=nn.Identity())
    inputs, upstream = torch.randn(1, 1111, columns, requires_grad=True), torch.randn(1, 1111, rows)
    exact = inputs.detach().double().requires_grad_()

    layer(inputs).backward(upstream)
    oracle(exact).backward(upstream.double())

    assert len(asked) == 2 + (columns != 300)
    torch.testing.assert_close(layer(inputs).double(), oracle(exact), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(layer.parameters(), oracle.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None and found.grad.is_contiguous()
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-5, atol=2e-4)


def test_only_gradients_that_are_wanted_are_computed(asked: list[tuple[int, ...]]) -> None:
    layer = nn.Sequential(nn.Linear(512, 512))
    teach_linear_layers(layer, but=nn.Identity())
    layer.requires_grad_(False)
    layer(torch.randn(1000, 512, requires_grad=True)).sum().backward()
    assert len(asked) == 2 and layer[0].weight.grad is None
    with torch.no_grad():
        layer(torch.randn(1000, 512))
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("dtype", "tokens"), [(torch.float32, 10), (torch.bfloat16, 1000), (torch.float64, 1000)], ids=str
)
def test_other_products_are_left_to_torch(asked: list[tuple[int, ...]], dtype: torch.dtype, tokens: int) -> None:
    layer = nn.Sequential(nn.Linear(512, 512, dtype=dtype))
    inputs = torch.randn(tokens, 512, dtype=dtype)
    before = layer(inputs)
    teach_linear_layers(layer, but=nn.Identity())
    assert torch.equal(layer(inputs), before)
    assert not asked


@pytest.mark.parametrize(
    ("capability", "has_bfloat16", "dtype", "taught"),
    [
        ("AVX512", True, torch.float32, True),
        ("AVX2", False, torch.bfloat16, True),
        # Nothing is gained, and asking at every call costs a small model more than its product.
        ("AVX2", False, torch.float32, False),
    ],
)
def test_the_head_and_layers_of_other_kinds_are_left_alone_and_all_where_nothing_is_gained(
    capability: str, has_bfloat16: bool, dtype: torch.dtype, taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(nn.Linear):
        pass

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_has_bfloat16", lambda: has_bfloat16)
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "other": Other(2, 2), "head": nn.Linear(2, 2)}).to(dtype)
    teach_linear_layers(model, but=model["head"])
    assert [type(module) is nn.Linear for module in model.values()] == [not taught, False, True]
    assert type(model["other"]) is Other and isinstance(model["layer"], nn.Linear)


@pytest.mark.parametrize(("capability", "wide"), [("AVX2", 10_000), ("AVX512", 10_001)])
def test_a_product_is_made_in_parts_and_written_where_it_belongs(
    capability: str, wide: int, asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_WIDE", wide)
    inputs, weight, out = torch.randn(100, 128), torch.randn(10_000, 128), torch.full((100, 10_000), torch.nan)
    multiply_into(out, inputs, weight)
    torch.testing.assert_close(out.double(), inputs.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
    assert asked == [(4096, 128), (4096, 128), (10_000 - 2 * 4096, 128)]


@pytest.mark.parametrize(
    ("where", "name", "answer", "columns"),
    [
        (torch.backends.mkldnn, "is_available", False, 512),
        (torch.backends.mkldnn, "is_available", False, 5000),
        (torch.backends.cpu, "get_cpu_capability", "AVX2", 512),
        (torch.backends.cpu, "get_cpu_capability", "AVX2", 5000),
    ],
)
def test_torch_multiplies_without_the_operator_and_narrow_ones_without_avx512(
    asked: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    answer: object,
    columns: int,
) -> None:
    monkeypatch.setattr(where, name, lambda: answer)
    inputs, weight, out = torch.randn(1000, 512), torch.randn(columns, 512), torch.empty(1000, columns)
    multiply_into(out, inputs, weight)
    parts = [inputs @ part.T for part in weight.split(products._MKL_PART)]
    assert torch.equal(out, torch.cat(parts, dim=1)) and not asked
    torch.testing.assert_close(out.double(), inputs.double() @ weight.double().T, rtol=1e-5, atol=1e-3)


@pytest.fixture
def no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products in bfloat16; inner dimensions and heads are cut, too."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(products, "_PART", 50)


@pytest.mark.usefixtures("no_bfloat16")
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_computed_in_float32_and_rounded_once(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(120, 130, bias=bias, dtype=torch.bfloat16))
    exact = nn.Linear(120, 130, bias=bias)
    exact.load_state_dict(layer[0].state_dict())
    teach_linear_layers(layer, but=nn.Identity())
    inputs, slope = torch.randn(2, 70, 120).bfloat16().requires_grad_(), torch.randn(2, 70, 130).bfloat16()
    wide = inputs.detach().float().requires_grad_()

    layer(inputs).backward(slope)
    exact(wide).backward(slope.float())

    # One rounding to 8 bits.
    rounding = {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(layer(inputs).float(), exact(wide), **rounding)
    torch.testing.assert_close(inputs.grad.float(), wide.grad, **rounding)
    torch.testing.assert_close(layer[0].weight.grad.float(), exact.weight.grad, **rounding)
    if bias:
        torch.testing.assert_close(layer[0].bias.grad.float(), exact.bias.grad, rtol=2**-7, atol=1e-2)


def test_a_model_in_bfloat16_is_as_near_to_float32_without_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(dtype: torch.dtype, *, has_bfloat16: bool = True) -> list[Tensor]:
        products._has_bfloat16.cache_clear()
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16, raising=False)
        # The same weights: those of bfloat16.
        packed = PackedModel(build("qwen2", dtype=torch.bfloat16).to(dtype), chunk_tokens=5)
        logps = packed(pack(examples(responses=2))).logps
        logps.sum().backward()
        return [logps.detach(), *(parameter.grad.float() for parameter in packed.parameters())]

    exact = scored(torch.float32)
    plain, widened = (scored(torch.bfloat16, has_bfloat16=has_bfloat16) for has_bfloat16 in (True, False))

    def error(found: list[Tensor]) -> float:
        return sum(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    assert 0 < error(widened) < 1.1 * error(plain)


def test_attention_in_float32_keeps_nothing_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(*, has_bfloat16: bool) -> int:
        monkeypatch.setattr(products, "_has_bfloat16", lambda: has_bfloat16)
        packed = PackedModel(build("qwen2", dtype=torch.bfloat16))
        tensors = kept_by_autograd(lambda: packed(pack(examples(responses=2))))
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert kept(has_bfloat16=False) < kept(has_bfloat16=True)


def test_a_few_rows_in_bfloat16_are_left_to_torch(no_bfloat16: None) -> None:
    layer = nn.Sequential(nn.Linear(120, 130, dtype=torch.bfloat16))
    inputs = torch.randn(3, 120).bfloat16()
    before = layer(inputs)
    teach_linear_layers(layer, but=nn.Identity())
    assert torch.equal(layer(inputs), before)


_ROWS_OF_MANY_LENGTHS = """
import resource
import torch
from dpo_cli.policy.products import keep_few_kernels
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
keep_few_kernels(torch.bfloat16)
weight = torch.randn(512, 256, dtype=torch.bfloat16)
for length in range(500, 850):
    torch.randn(length, 256, dtype=torch.bfloat16) @ weight.T
    if length == 650:
        before = peak()
print(peak() / before)
"""


def test_kernels_for_rows_of_many_lengths_do_not_pile_up() -> None:
    told = subprocess.run(
        [sys.executable, "-c", _ROWS_OF_MANY_LENGTHS], check=True, capture_output=True, text=True, timeout=300
    )
    # Nothing is added; with the default it is 1.14 times as much.
    assert float(told.stdout) < 1.05
