"""A key-value cache that grows in place: a token does not copy all those before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


def growing_cache() -> Cache:
    """One that is empty, of `GrowingLayer`s."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def without_gaps(cache: Cache, seen: Tensor) -> Tensor:
    """Move what is seen of each row to the right, and cut off what no row sees; returns what is seen then.

    cache: of `growing_cache`. seen: (rows, tokens), 1 where a row's token counts, 0 where it is padding or was refused.
    """
    columns = seen.sort(dim=1, stable=True).indices[:, -int(seen.sum(1).max()) :]
    for layer in cache.layers:
        assert isinstance(layer, GrowingLayer)
        layer.select_tokens(columns)
    return seen.gather(1, columns)


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to spare, so that a token does not copy all those before it.

    `keys` and `values` are what is filled of the buffers: (rows, heads, tokens, width).
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = (
                self._grown(self.keys, key_states, start, end),
                self._grown(self.values, value_states, start, end),
            )
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        keys, values = self._buffers
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None

    def select_tokens(self, columns: Tensor) -> None:
        """Only keep these of each row, (rows, tokens)."""
        if self.is_initialized:
            index = columns[:, None, :, None]
            self.keys, self.values = (
                states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (self.keys, self.values)
            )
            self._buffers = None

    @staticmethod
    def _grown(filled: Tensor, states: Tensor, start: int, end: int) -> Tensor:
        rows, heads, _, width = states.shape
        buffer = states.new_empty(rows, heads, end + max(64, end // 4), width)
        if start:
            buffer[..., :start, :] = filled
        return buffer
