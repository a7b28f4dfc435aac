"""Attention over packed rows, entered through transformers' own door (`AttentionInterface`).

A response's queries see the keys of its prompt and, causally, their own. Segments of similar shape are gathered into
one batched scaled_dot_product_attention, so cost is linear in the number of responses and small models are not drowned
in calls. This is the plain PyTorch route: it runs on any CPU and GPU. `attention_routes` knows the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dpo_cli.batch.blocks import cut_queries, is_cut
from dpo_cli.batch.layout import PackedRow, Segment
from dpo_cli.batch.transfer import to_device
from dpo_cli.errors import ModelError
from dpo_cli.policy.products import widens

PACKED_ATTENTION = "packed"

# A bucket may hold this much more than its segments need before a new one is begun: a padded score costs less than a
# further call for short segments, more than it for long ones.
MAX_PADDING_RATIO = 1.15
# Scores (queries x keys) in one call, per head; bounds the mask and whatever the kernel materialises.
MAX_SCORES_PER_CALL = 2**22
# What some models hand their attention besides; none of it is computed in packed rows.
_OTHER_INPUTS = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
# A position after all others.
_NOWHERE = 2**31 - 1


class RowAttention(Protocol):
    """How one packed row is attended to; made once, used by every layer."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
        """q (T, heads, d), k and v (T, kv_heads, d) -> (T, heads, d).

        scaling: of the scores, 1 / sqrt(d) by default. window: a query sees so many keys, its own among them.
        """


@dataclass(frozen=True)
class RowPlan:
    """What every layer is told of a packed row.

    scored: (S,) ascending, the rows that predict a response token. scored_attention: how these are attended to, where
        nobody looks at the others; what it gives for those is of no meaning.
    """

    attention: RowAttention
    scored: Tensor
    scored_attention: RowAttention


@dataclass(frozen=True)
class Bucket:
    """Blocks attended to in one call: n of them, padded to Q queries and L keys.

    query_positions, key_positions: (n, Q), (n, L) int32, positions within prompt + response. Padding queries stand at
        0, where they see the first key, as a softmax over nothing is NaN; padding keys at _NOWHERE.
    causal: blocks that see no key before their own. They need no mask, padded or not: what is padded stands after all
        that is seen.
    """

    query_positions: Tensor
    key_positions: Tensor
    causal: bool
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(n, 1, Q, L), added to scores: 0 where a query sees a key, else -inf. All layers share it.

        window: keys further back than that are unseen. A mask of bools would become one of these in every layer.
        """
        if (window, dtype) not in self._masks:
            queries, keys = self.query_positions[:, None, :, None], self.key_positions[:, None, None, :]
            unseen = keys > queries
            if window is not None:
                unseen |= keys <= queries - window
            self._masks[window, dtype] = torch.where(unseen, float("-inf"), 0.0).to(dtype)
        return self._masks[window, dtype]


@dataclass(frozen=True)
class AttentionPlan:
    """The plain route: a scaled_dot_product_attention a bucket.

    queries, keys: rows of the packed row that the buckets take, bucket after bucket; padding repeats row 0 and is never
        looked at. Gathered at once: a gather for every bucket would have a gradient as large as the row for each.
    inverse: (T,) where in the concatenated bucket outputs each row of the packed row lies; a row that no bucket has for
        a query gets some other's.
    """

    buckets: tuple[Bucket, ...]
    queries: Tensor
    keys: Tensor
    inverse: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
        queries = q.index_select(0, self.queries).split([bucket.query_positions.numel() for bucket in self.buckets])
        lengths = [bucket.key_positions.numel() for bucket in self.buckets]
        keys, values = (states.index_select(0, self.keys).split(lengths) for states in (k, v))
        outputs = [
            _attend(bucket, *states, scaling=scaling, window=window)
            for bucket, states in zip(self.buckets, zip(queries, keys, values, strict=True), strict=True)
        ]
        return torch.cat(outputs).index_select(0, self.inverse)


class _Block(NamedTuple):
    """Queries [query_start, query_end) see keys [prefix_start, prefix_end) and, causally, rows from key_start on."""

    query_start: int
    query_end: int
    prefix_start: int
    prefix_end: int
    key_start: int

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        prefix = self.prefix_end - self.prefix_start
        return self.query_end - self.query_start, prefix + self.query_end - self.key_start

    @property
    def causal(self) -> bool:
        queries, keys = self.shape
        return queries == keys


def plan_attention(segments: Sequence[Segment], device: torch.device, *, tokens: int | None = None) -> AttentionPlan:
    """Group segments, on a CPU blocks of them, into buckets of similar shape. Pure: depends on its arguments alone.

    tokens: of the row, where its segments leave some out.
    Those that see keys before their own, which need a mask, are kept apart: a causal kernel does half the work on GPUs.
    """
    blocks = [block for segment in segments for block in _blocks(segment, cut=device.type == "cpu")]
    blocks.sort(key=lambda block: (block.causal, *block.shape, block.query_start))
    groups: list[list[_Block]] = []
    widest = deepest = needed = 0
    for block in blocks:
        q, k = block.shape
        grown_queries, grown_keys = max(widest, q), max(deepest, k)
        count = len(groups[-1]) + 1 if groups else 1
        padded = count * grown_queries * grown_keys
        alike = bool(groups) and block.causal == groups[-1][0].causal
        if alike and padded <= min(MAX_PADDING_RATIO * (needed + q * k), MAX_SCORES_PER_CALL):
            groups[-1].append(block)
            widest, deepest, needed = grown_queries, grown_keys, needed + q * k
        else:
            groups.append([block])
            widest, deepest, needed = q, k, q * k

    inverse, offset = np.zeros(tokens or sum(block.shape[0] for block in blocks), np.int64), 0
    rows = [_rows(group) for group in groups]
    for group, (its_queries, *_) in zip(groups, rows, strict=True):
        for block, first in zip(group, range(offset, offset + its_queries.size, its_queries.shape[1]), strict=True):
            inverse[block.query_start : block.query_end] = np.arange(first, first + block.shape[0])
        offset += its_queries.size
    queries, query_positions, keys, key_positions = (list(arrays) for arrays in zip(*rows, strict=True))
    positions = zip(groups, _each(query_positions, device), _each(key_positions, device), strict=True)
    buckets = tuple(Bucket(q, k, causal=all(block.causal for block in group)) for group, q, k in positions)
    return AttentionPlan(
        buckets, _joined(queries, device), _joined(keys, device), to_device(torch.from_numpy(inverse), device)
    )


def plan_scored_attention(row: PackedRow, device: torch.device) -> AttentionPlan:
    """Of the scored rows alone, on a CPU; whole sequences where these are not cut, as their kernel needs no mask."""
    segments = [
        scored if is_cut(whole.query_end - whole.query_start) else whole
        for whole, scored in zip(row.segments, row.scored_segments, strict=False)
    ]
    return plan_attention(segments, device, tokens=len(row.input_ids))


def _blocks(segment: Segment, *, cut: bool) -> Iterator[_Block]:
    start, end, prefix_start, prefix_end = segment
    for first, last in cut_queries(end - start) if cut else [(0, end - start)]:
        yield _Block(start + first, start + last, prefix_start, prefix_end, key_start=start)


def _rows(blocks: Sequence[_Block]) -> tuple[NDArray[np.integer], ...]:
    """Of a bucket: the rows that it takes queries from, (n, Q), their positions, and the same of keys, (n, L)."""
    n, (width, depth) = len(blocks), map(max, zip(*(block.shape for block in blocks), strict=True))
    queries, query_positions = np.zeros((n, width), np.int64), np.zeros((n, width), np.int32)
    keys, key_positions = np.zeros((n, depth), np.int64), np.full((n, depth), _NOWHERE, np.int32)
    for row, block in enumerate(blocks):
        q, k = block.shape
        prefix = block.prefix_end - block.prefix_start
        queries[row, :q] = np.arange(block.query_start, block.query_end)
        query_positions[row, :q] = np.arange(k - q, k)
        keys[row, :prefix] = np.arange(block.prefix_start, block.prefix_end)
        keys[row, prefix:k] = np.arange(block.key_start, block.query_end)
        key_positions[row, :k] = np.arange(k)
    return queries, query_positions, keys, key_positions


def _joined(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.concatenate([array.ravel() for array in arrays])), device)


def _each(arrays: Sequence[NDArray[np.integer]], device: torch.device) -> list[Tensor]:
    """Parts of one tensor: a copy to a GPU costs more than what is copied."""
    parts = _joined(arrays, device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    segments: RowPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer. query (1, heads, T, d), key and value (1, kv_heads, T, d) -> (1, T, heads, d).

    Without a plan (generation, plain forwards) this is transformers' own sdpa route.
    """
    if segments is None:
        if _packing.get():
            # Plain causal attention over the whole row would run without a complaint, off by several nats a token.
            raise ModelError(
                f"{type(module).__name__} cannot be scored in packed rows: its layers do not hand the row's plan on."
            )
        return plain_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if attention_mask is not None:
        raise ModelError(f"{type(module).__name__} builds a mask of its own, which packed rows cannot honour.")
    for other in _OTHER_INPUTS:
        if kwargs.get(other) is not None:
            raise ModelError(f"{type(module).__name__} uses {other}, which packed attention does not compute.")
    if dropout:
        raise ModelError("Attention dropout must be off: reference and policy would not be comparable.")

    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, d)
    return segments.attention.attend(q, k, v, scaling=scaling, window=sliding_window)[None], None


def plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' own sdpa route, and on a CPU with a mask, when text is generated, the same without its detours."""
    if mask is None or query.device.type != "cpu" or any(kwargs.get(other) is not None for other in _OTHER_INPUTS):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    # A CPU's kernel takes grouped queries beside a mask, so that keys and values need not be repeated.
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=kwargs["dropout"], scale=kwargs["scaling"], enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def _attend(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One bucket: q (n * Q, heads, d), k and v (n * L, kv_heads, d) -> (n * Q, heads, d)."""
    if widens(q):
        narrow: Tensor = _Widened.apply(q, k, v, partial(_attend, bucket, scaling=scaling, window=window))
        return narrow
    n, depth = bucket.key_positions.shape
    queries, keys, values = (states.view(n, -1, *states.shape[1:]).transpose(1, 2) for states in (q, k, v))
    causal = bucket.causal and (window is None or depth <= window)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not causal and q.is_cuda:
        # CUDA's fused kernels take grouped queries or a mask, not both; what is left then holds all scores in memory.
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        groups = 1
    attended = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if causal else bucket.mask(window, queries.dtype),
        is_causal=causal,
        scale=scaling,
        enable_gqa=groups > 1,
    )
    return attended.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)


class _Widened(torch.autograd.Function):
    """One bucket in float32, rounded. It is attended to again in the backward pass: nothing is kept in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.attend = attend
        return attend(q.float(), k.float(), v.float()).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide = [states.detach().float().requires_grad_() for states in ctx.saved_tensors]
        with torch.enable_grad():
            attended = ctx.attend(*wide)
        gradients = torch.autograd.grad(attended, wide, grad.float())
        return *(gradient.to(grad.dtype) for gradient in gradients), None


_packing: ContextVar[bool] = ContextVar("packing", default=False)


@contextmanager
def packing() -> Iterator[None]:
    """While open, models build no attention mask: the plan says who sees whom."""
    token = _packing.set(True)
    try:
        yield
    finally:
        _packing.reset(token)


def _mask_unless_packing(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packing.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask_unless_packing)
