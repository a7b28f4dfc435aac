"""Examples with their reference values, cut into what goes through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.batch.plan import microbatches
from dpo_cli.data.example import Example, Examples
from dpo_cli.engine.ranks import Ranks
from dpo_cli.reference.sums import ReferenceSums

Indices = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together, with their references: (K,) float64 each, None if none is needed.

    idle: only there because all ranks must do equally many forward and backward passes; it counts for nothing.
    """

    examples: tuple[Example, ...]
    references: tuple[NDArray[np.float64], ...] | None
    idle: bool = False

    def reference(self, first_responses: int | None, device: torch.device) -> Tensor | None:
        """The reference sums of (the first) responses, (N,), example after example."""
        if self.references is None:
            return None
        return torch.from_numpy(np.concatenate([sums[:first_responses] for sums in self.references])).to(device)

    def alone(self) -> list[MicroBatch]:
        """Every example as a micro-batch of its own."""
        references = self.references or (None,) * len(self.examples)
        return [
            MicroBatch((example,), None if sums is None else (sums,))
            for example, sums in zip(self.examples, references, strict=True)
        ]


@dataclass(frozen=True)
class PreferenceData:
    """Examples with what the reference says of them."""

    examples: Examples
    reference: ReferenceSums | None

    def microbatches(self, indices: Indices, *, tokens_per_microbatch: int, ranks: Ranks) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch; every rank gets equally many."""
        sizes = [int(self.examples.sizes[i]) for i in indices]
        plan = microbatches(sizes, tokens_per_microbatch=tokens_per_microbatch, ranks=ranks.size)
        smallest = min(range(len(sizes)), key=sizes.__getitem__)
        return [
            self._microbatch([int(indices[place]) for place in places or [smallest]], idle=not places)
            for places in plan[ranks.rank :: ranks.size]
        ]

    def _microbatch(self, indices: Sequence[int], *, idle: bool) -> MicroBatch:
        return MicroBatch(
            examples=tuple(self.examples[index] for index in indices),
            references=None if self.reference is None else tuple(self.reference.of(index) for index in indices),
            idle=idle,
        )
