"""Every kernel gets the same segments: packed rows as sequences of different lengths, and as a mask of blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, EXACT_GRADIENTS, build, examples
from tiny_models import settings as model_settings
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from dpo_cli.batch.layout import Segment, pack, padded
from dpo_cli.data.example import Example
from dpo_cli.errors import ModelError
from dpo_cli.policy import attention_routes
from dpo_cli.policy.attention import plan_attention, plan_scored_attention
from dpo_cli.policy.attention_routes import PLAIN, AttentionRoute, Heads, choose_attention
from dpo_cli.policy.flex_attention import plan_flex
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.varlen_attention import VarlenCall, plan_varlen, torch_varlen_call

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = build("qwen2").config


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_keys: int,
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """The documented meaning of flash_attn_varlen_func with causal=True and window_size=(window, 0), line by line."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert (query_ends[-1], key_ends[-1]) == (len(q), len(k))
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert longest_query == query_ends.diff().max() and longest_keys == key_ends.diff().max()
    outputs = []
    for queries, keys in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        mine, theirs = slice(*queries), slice(*keys)
        groups = q.shape[1] // k.shape[1]
        keys_of_heads, values = (states[theirs].repeat_interleave(groups, dim=1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[mine], keys_of_heads) * scaling
        # Query i of n stands where key i + (keys - n) does.
        place = torch.arange(scores.shape[1])[:, None] + scores.shape[2] - scores.shape[1]
        key = torch.arange(scores.shape[2])
        seen = (key <= place) & (key >= place - window) if window is not None else key <= place
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


WRITTEN_OUT = AttentionRoute("packed-written-out", partial(plan_varlen, call=written_out))


@pytest.fixture(autouse=True)
def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.parametrize("responses", [1, 2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_as_sequences_of_different_lengths_give_the_plain_route_s_numbers(name: str, responses: int) -> None:
    row = pack(examples(responses=responses))
    found = []
    for route in (PLAIN, WRITTEN_OUT):
        model = build(name)
        logps = PackedModel(model, attention=route)(row).logps
        (logps * torch.linspace(0.5, 2.0, len(logps), dtype=logps.dtype)).sum().backward()
        found.append((logps, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (plain, wanted), (varlen, gradients) = found
    assert (varlen - plain).abs().max() < 1e-10
    for key, gradient in wanted.items():
        largest = gradient.abs().max()
        if largest > 1e-9:
            assert (gradients[key] - gradient).abs().max() / largest < (1e-10 if name in EXACT_GRADIENTS else 3e-6), key


@st.composite
def segments_of_rows(draw: st.DrawFn) -> list[Segment]:
    """As `pack` makes them, also with lengths beyond FlexAttention's blocks of 128."""
    found: list[Segment] = []
    cursor, length = 0, st.integers(1, 150)
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(length)
        start, end = cursor, cursor + prompt
        cursor = end + draw(length)
        found.append(Segment(start, cursor, start, start))
        for _ in range(draw(st.integers(0, 3))):
            first, cursor = cursor, cursor + draw(length)
            found.append(Segment(first, cursor, start, end))
    return found


def states(tokens: int, width: int = 16, value_width: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, width), (2, width), (2, value_width or width))
    return [torch.randn(tokens, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(deadline=None, max_examples=25)
@given(segments_of_rows(), st.sampled_from([None, 1, 5, 130]))
def test_flex_attention_s_mask_and_blocks_are_the_plain_route_s(segments: list[Segment], window: int | None) -> None:
    drawn = [part.float() for part in states(segments[-1].query_end)]
    wanted = plan_attention(segments, CPU).attend(*drawn, scaling=0.3, window=window)
    found = plan_flex(segments, CPU, flex.flex_attention).attend(*drawn, scaling=0.3, window=window)
    assert (found - wanted).abs().max() < 1e-5


@settings(deadline=None, max_examples=25)
@given(segments_of_rows())
def test_flex_attention_visits_every_block_that_holds_a_key_some_query_sees(segments: list[Segment]) -> None:
    plan = plan_flex(segments, CPU, flex.flex_attention)
    tokens = segments[-1].query_end
    visited = torch.zeros(len(plan.block_counts), len(plan.block_counts), dtype=torch.bool)
    for row, (count, ids) in enumerate(zip(plan.block_counts.tolist(), plan.block_ids.tolist(), strict=True)):
        visited[row, ids[:count]] = True
    for segment in segments:
        for query in range(segment.query_start, segment.query_end):
            keys = [*range(segment.prefix_start, segment.prefix_end), *range(segment.query_start, query + 1)]
            assert visited[query // 128, [key // 128 for key in keys]].all()
    assert visited.shape[0] == -(-tokens // 128)


@settings(deadline=None, max_examples=25)
@given(segments_of_rows(), st.sampled_from([None, 1, 5, 130]), st.sampled_from([(16, 16), (12, 8), (8, 12)]))
def test_sequences_of_any_length_width_and_window(
    segments: list[Segment], window: int | None, widths: tuple[int, int]
) -> None:
    drawn = states(segments[-1].query_end, *widths)
    wanted = plan_attention(segments, CPU).attend(*drawn, scaling=None, window=window)
    found = plan_varlen(segments, CPU, written_out).attend(*drawn, scaling=None, window=window)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("window", [None, 5, 130])
@pytest.mark.parametrize(
    "lengths", [((300, 40, 60), (5, 1, 200)), ((700, 100, 90), (20, 30, 1)), ((10, 800, 900),)], ids=str
)
def test_scored_rows_attended_to_alone_are_attended_to_as_in_the_whole_row(
    lengths: tuple[tuple[int, ...], ...], window: int | None
) -> None:
    """Also of sequences that are too long to be cut, and in rows that are padded."""
    parts = [[np.arange(1, length + 1, dtype=np.int32) for length in pair] for pair in lengths]
    row = padded(pack([Example(prompt, (chosen, rejected)) for prompt, chosen, rejected in parts]), 64)
    drawn = [part.requires_grad_() for part in states(len(row.input_ids))]
    slope = torch.randn(len(row.scored), 4, 16, dtype=torch.float64)
    found, wanted = (
        plan.attend(*drawn, scaling=None, window=window)
        for plan in (plan_scored_attention(row, CPU), plan_attention(row.segments, CPU))
    )
    assert found.shape == wanted.shape
    assert (found - wanted)[row.scored].abs().max() < 1e-12
    for a, b in zip(
        *(torch.autograd.grad(attended[row.scored], drawn, slope) for attended in (found, wanted)), strict=True
    ):
        assert (a - b).abs().max() < 1e-12


def test_a_row_whose_responses_share_no_prompt_gathers_no_keys() -> None:
    assert plan_varlen(pack(examples(responses=1)).segments, CPU, written_out).key_rows is None
    assert plan_varlen(pack(examples(responses=2)).segments, CPU, written_out).key_rows is not None


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_a_cpu_has_the_plain_route_and_nothing_to_say(name: str) -> None:
    assert choose_attention(name, CONFIG, device=CPU, dtype=torch.bfloat16) is PLAIN
    assert PLAIN.told is None


@pytest.mark.parametrize("name", ["flash", "varlen", "flex"])
def test_a_kernel_that_cannot_be_had_is_an_error_where_it_was_asked_for(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        choose_attention(name, CONFIG, device=CPU, dtype=torch.bfloat16)
    assert caught.value.where == f"model.attention={name}"
    assert "auto" in str(caught.value.hint)


def test_a_kernel_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="attention"):
        model_settings("model", attention="fast")


def probed(call: VarlenCall, monkeypatch: pytest.MonkeyPatch) -> AttentionRoute:
    """What auto finds where `call` is the only kernel, and the device passes for a GPU."""
    kernels = {"varlen": ("a kernel", lambda: partial(plan_varlen, call=call))}
    monkeypatch.setattr(attention_routes, "_KERNELS", kernels)
    monkeypatch.setattr(attention_routes, "_check_possible", lambda *_: None)
    config = build("mistral-sliding").config

    class PassesForGpu:
        type = "cuda"

    monkeypatch.setattr(attention_routes, "_probe", partial(on_the_cpu, attention_routes._probe))
    return choose_attention("auto", config, device=PassesForGpu(), dtype=torch.bfloat16)  # type: ignore[arg-type]


def on_the_cpu(probe: object, plan: object, heads: Heads, _: object, dtype: torch.dtype) -> None:
    probe(plan, heads, CPU, dtype)  # type: ignore[operator]


def test_a_kernel_that_computes_rightly_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    route = probed(written_out, monkeypatch)
    assert (route.name, route.told) == ("packed-varlen", "a kernel, one call a layer")


def upper_left(q: Tensor, k: Tensor, v: Tensor, query_ends: Tensor, key_ends: Tensor, *_: int, **how: Any) -> Tensor:
    """The causal mask of flash-attn before 2.1: a second response would see the beginning of its prompt alone."""
    parts = []
    for queries, keys in zip(query_ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        length = queries[1] - queries[0]
        ends = torch.tensor([0, length], dtype=torch.int32)
        mine, theirs = slice(*queries), slice(keys[0], keys[0] + length)
        parts.append(written_out(q[mine], k[theirs], v[theirs], ends, ends, length, length, **how))
    return torch.cat(parts)


def without_window(*given: Any, scaling: float, window: int | None) -> Tensor:
    return written_out(*given, scaling=scaling, window=None)


def one_key_too_many(*given: Any, scaling: float, window: int | None) -> Tensor:
    return written_out(*given, scaling=scaling, window=None if window is None else window + 1)


def forward_only(*given: Any, scaling: float, window: int | None) -> Tensor:
    return written_out(*given, scaling=scaling, window=window).detach()


def broken(*given: object, scaling: float, window: int | None) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nand more")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (upper_left, "outputs differ"),
        (without_window, "outputs differ"),
        (one_key_too_many, "outputs differ"),
        (forward_only, "does not require grad"),
        (broken, "no kernel image is available for execution on the device)"),
    ],
)
def test_a_kernel_that_is_wrong_or_broken_is_passed_over_and_named(
    call: VarlenCall, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = probed(call, monkeypatch)
    assert route.name == "packed-sdpa"
    assert route.told is not None and "not a kernel: " in route.told and said in route.told


# GPT-NeoX knows no grouped queries; the number of key heads in its config here means nothing to it.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt-neox"])
def test_the_heads_of_every_architecture_are_read_rightly(name: str) -> None:
    model = build(name)
    seen: list[tuple[Tensor, ...]] = []

    class Spy:
        def __init__(self, segments: object, device: torch.device) -> None:
            self.plan = plan_attention(segments, device)  # type: ignore[arg-type]

        def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
            seen.append((q, k, v))
            return self.plan.attend(q, k, v, scaling=scaling, window=window)

    PackedModel(model, attention=AttentionRoute("spy", Spy))(pack(examples(responses=2)))
    heads = Heads.of(model.config)
    for q, k, v in seen:
        assert q.shape[1:] == (heads.queries, heads.width)
        assert k.shape[1:] == (heads.keys, heads.width)
        assert v.shape[1:] == (heads.keys, heads.value_width)


def test_torch_s_varlen_attention_takes_what_it_is_given() -> None:
    """As far as a machine without a GPU goes: shapes and arguments, on tensors without values."""
    segments = pack(examples(responses=2)).segments
    call, meta = torch_varlen_call(), torch.device("meta")
    plan = plan_varlen(segments, CPU, call)
    ends = (plan.query_ends.to(meta), plan.key_ends.to(meta), plan.longest_query, plan.longest_keys)
    tokens, keys = segments[-1].query_end, len(plan.key_rows)  # type: ignore[arg-type]
    q = torch.empty(tokens, 4, 64, dtype=torch.bfloat16, device=meta, requires_grad=True)
    k, v = (torch.empty(keys, 2, 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for _ in range(2))
    for window in (None, 9):
        out = call(q, k, v, *ends, scaling=0.125, window=window)
        assert out.shape == q.shape
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
