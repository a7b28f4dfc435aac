"""Per-token weights: less (or nothing) on what one response of a pair has beyond the length of the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dpo_cli.data.example import Example, Examples, FloatArray, IntArray


@dataclass(frozen=True)
class TailWeighted:
    """The same examples; tokens beyond the length of the shorter response weigh `tail_weight` times what they did.

    Made as they are read: the tokens, and what is kept of the reference for them, are those of the examples without it.

    Source: LD-DPO, arXiv:2409.06411: the probabilities of the tail enter that of a response with the power alpha.
    """

    whole: Examples
    tail_weight: float

    @property
    def sizes(self) -> IntArray:
        return self.whole.sizes

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Example:
        example = self.whole[index]
        shared = min(map(len, example.responses))
        before = example.weights or tuple(np.ones(len(ids), np.float32) for ids in example.responses)
        return replace(example, weights=tuple(self._weigh(weights, shared) for weights in before))

    def _weigh(self, weights: FloatArray, shared: int) -> FloatArray:
        return np.concatenate([weights[:shared], weights[shared:] * np.float32(self.tail_weight)])
