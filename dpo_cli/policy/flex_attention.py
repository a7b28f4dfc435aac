"""A packed row by FlexAttention: one compiled call a layer, which skips keys that no query of a block sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_cli.batch.layout import Segment
from dpo_cli.batch.transfer import to_device

_BLOCK = 128
Flex = Callable[..., Any]


@functools.cache
def compiled_flex() -> Flex:
    """Compiled at its first use, and once more when rows turn out to differ in length."""
    return torch.compile(flex_attention)


@dataclass(frozen=True)
class FlexPlan:
    """Who sees whom, by query row: (T,) int32 each, and the blocks of keys that a block of queries looks at.

    own_start: its segment's first row. prefix_start, prefix_end: its prompt's rows, if those are elsewhere.
    prefix_shift: a key of the prompt stands so many rows further from the query than their positions tell.
    block_counts (blocks,), block_ids (blocks, blocks): how many, and which in the first places.
    """

    flex: Flex
    own_start: Tensor
    prefix_start: Tensor
    prefix_end: Tensor
    prefix_shift: Tensor
    block_counts: Tensor
    block_ids: Tensor
    _masks: dict[int | None, BlockMask] = field(default_factory=dict)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
        if window not in self._masks:
            self._masks[window] = self._mask(window, len(q))
        attended: Tensor = self.flex(
            *(states.transpose(0, 1)[None] for states in (q, k, v)),
            block_mask=self._masks[window],
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return attended[0].transpose(0, 1)

    def _mask(self, window: int | None, tokens: int) -> BlockMask:
        own_start, prefix_start, prefix_end = self.own_start, self.prefix_start, self.prefix_end
        prefix_shift = self.prefix_shift

        # Functions of their own for the two cases: what a mask captures is compiled into the kernel.
        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (key >= own_start[query]) & (key <= query)
            return own | ((key >= prefix_start[query]) & (key < prefix_end[query]))

        def sees_within_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert window is not None
            distance = query - key
            own = (key >= own_start[query]) & (distance >= 0) & (distance < window)
            prefix = (key >= prefix_start[query]) & (key < prefix_end[query])
            return own | (prefix & (distance - prefix_shift[query] < window))

        return BlockMask.from_kv_blocks(
            self.block_counts[None, None],
            self.block_ids[None, None],
            BLOCK_SIZE=_BLOCK,
            mask_mod=sees if window is None else sees_within_window,
            seq_lengths=(tokens, tokens),
        )


def plan_flex(segments: Sequence[Segment], device: torch.device, flex: Flex | None = None) -> FlexPlan:
    """flex: instead of the compiled flex_attention."""
    lengths = [segment.query_end - segment.query_start for segment in segments]

    def by_query(values: Sequence[int]) -> Tensor:
        return to_device(torch.from_numpy(np.repeat(np.array(values, dtype=np.int32), lengths)), device)

    counts, ids = _blocks(segments)
    return FlexPlan(
        flex=flex or compiled_flex(),
        own_start=by_query([segment.query_start for segment in segments]),
        prefix_start=by_query([segment.prefix_start for segment in segments]),
        prefix_end=by_query([segment.prefix_end for segment in segments]),
        prefix_shift=by_query([segment.query_start - segment.prefix_end for segment in segments]),
        block_counts=to_device(counts, device),
        block_ids=to_device(ids, device),
    )


def _blocks(segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Blocks of keys that some query of a block may see; the mask is applied in all of them, so more would not hurt."""
    count = -(-segments[-1].query_end // _BLOCK)
    seen = np.zeros((count, count), dtype=bool)
    for segment in segments:
        first, last = segment.query_start // _BLOCK, (segment.query_end - 1) // _BLOCK
        for row in range(first, last + 1):
            seen[row, first : row + 1] = True
        if segment.prefix_start < segment.prefix_end:
            prefix = slice(segment.prefix_start // _BLOCK, (segment.prefix_end - 1) // _BLOCK + 1)
            seen[first : last + 1, prefix] = True
    ids = np.argsort(~seen, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(seen.sum(axis=1).astype(np.int32)), torch.from_numpy(ids)
