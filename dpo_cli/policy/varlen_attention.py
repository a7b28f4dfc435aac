"""All segments of a packed row in one call of a kernel for sequences of different lengths.

    row        p p p p  a a a  b b  |  q q  c c  d d d
    queries    p p p p  a a a | b b | q q c c | d d d             the row as it lies
    keys       p p p p  a a a | p p p p b b | q q c c | q q d d d    gathered: every response after its prompt

FlashAttention aligns its causal mask with the lower right corner (since its version 2.1), so the last query of a
sequence sees all of its keys, and a response sees its prompt and itself.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_cli.batch.layout import Segment
from dpo_cli.batch.transfer import to_device

# The kernels' heads are multiples of this wide.
_WIDTH_STEP = 8


class VarlenCall(Protocol):
    """A kernel: queries (Tq, heads, d), keys and values (Tk, kv_heads, d) of N sequences -> (Tq, heads, d).

    query_ends, key_ends: (N + 1,) int32, where each sequence begins, and the last one ends. longest_*: their lengths.
    window: keys before a query that it sees beside its own; None for all.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        longest_query: int,
        longest_keys: int,
        /,
        *,
        scaling: float,
        window: int | None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class VarlenPlan:
    """One packed row as N sequences. key_rows: which rows their keys are, one after the other; None: the row itself."""

    call: VarlenCall
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_keys: int
    key_rows: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, window: int | None) -> Tensor:
        if self.key_rows is not None:
            k, v = k.index_select(0, self.key_rows), v.index_select(0, self.key_rows)
        # Values may be narrower than keys (multi-head latent attention). Zeros change no score and no output.
        width = -(-max(q.shape[-1], v.shape[-1]) // _WIDTH_STEP) * _WIDTH_STEP
        attended = self.call(
            _widened(q, width),
            _widened(k, width),
            _widened(v, width),
            self.query_ends,
            self.key_ends,
            self.longest_query,
            self.longest_keys,
            scaling=q.shape[-1] ** -0.5 if scaling is None else scaling,
            window=None if window is None else window - 1,
        )
        return attended[..., : v.shape[-1]]


def plan_varlen(segments: Sequence[Segment], device: torch.device, call: VarlenCall) -> VarlenPlan:
    """The segments, whose queries cover the row once and in order, as sequences of `call`."""
    queries = [segment.query_end - segment.query_start for segment in segments]
    keys = [
        length + segment.prefix_end - segment.prefix_start for length, segment in zip(queries, segments, strict=True)
    ]
    rows = [
        torch.arange(start, end) for segment in segments for start, end in (segment[2:], segment[:2]) if start < end
    ]
    return VarlenPlan(
        call=call,
        query_ends=to_device(_ends(queries), device),
        key_ends=to_device(_ends(keys), device),
        longest_query=max(queries),
        longest_keys=max(keys),
        key_rows=None if keys == queries else to_device(torch.cat(rows), device),
    )


def _ends(lengths: Sequence[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def _widened(states: Tensor, width: int) -> Tensor:
    return states if states.shape[-1] == width else F.pad(states, (0, width - states.shape[-1]))


def flash_attn_call() -> VarlenCall:
    """That of the package flash-attn. Raises ImportError where it is not installed, too old, or of another torch."""
    flash_attn: Any = importlib.import_module("flash_attn")
    kernel: Any = flash_attn.flash_attn_varlen_func
    if "window_size" not in inspect.signature(kernel).parameters:
        # Windows came with 2.3; before 2.1 the causal mask was aligned with the upper left corner.
        raise ImportError(f"flash-attn {flash_attn.__version__} is too old")

    def call(*sequences: Any, scaling: float, window: int | None) -> Tensor:
        attended: Tensor = kernel(
            *sequences,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1 if window is None else window, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended

    return call


def torch_varlen_call() -> VarlenCall:
    """torch's own FlashAttention kernel. Raises ImportError where this torch has none that knows windows and groups."""
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn
    if not {"window_size", "enable_gqa", "scale"} <= inspect.signature(kernel).parameters.keys():
        raise ImportError(f"torch {torch.__version__} has no varlen attention with windows and grouped queries")

    def call(*sequences: Any, scaling: float, window: int | None) -> Tensor:
        attended: Tensor = kernel(
            *sequences,
            scale=scaling,
            window_size=(-1 if window is None else window, 0),
            enable_gqa=sequences[0].shape[1] != sequences[1].shape[1],
        )
        return attended

    return call
