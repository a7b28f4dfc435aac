"""Examples with their reference values, cut into what goes through the model together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.batch.plan import shares
from dpo_cli.batch.transfer import to_device
from dpo_cli.data.example import Example, Examples, IntArray
from dpo_cli.engine.ranks import Ranks
from dpo_cli.reference.sums import ReferenceSums

Indices = Sequence[int] | NDArray[np.int64]


class Sampled(NamedTuple):
    """A prompt of the generator: example.responses are its ground truth, then what the policy wrote, no text twice.

    reference: their log-probs under the reference, (responses,) float64.
    drawn: for each sample its place among the responses; 0 where it repeats the truth.
    """

    example: Example
    reference: NDArray[np.float64]
    drawn: tuple[int, ...]

    @classmethod
    def of(cls, truth: Example, samples: Sequence[IntArray], reference: NDArray[np.float64]) -> Sampled:
        """truth: its first response is the ground truth. reference: of the truth, then of each sample.

        A trained policy repeats its truths and itself: what is said twice goes through the model once.
        """
        said = (truth.responses[0], *samples)
        places = first_places(said)
        kept = sorted(set(places))
        example = Example(truth.prompt, tuple(said[place] for place in kept), origin=truth.origin)
        return cls(example, reference[kept], tuple(kept.index(place) for place in places[1:]))


def first_places(texts: Sequence[IntArray]) -> list[int]:
    """For each text the place of the first that is the same, token for token."""
    first: dict[bytes, int] = {}
    return [first.setdefault(text.tobytes(), place) for place, text in enumerate(texts)]


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together, with their references: (K,) float64 each, None if none is needed.

    idle: only there because all ranks must do equally many forward and backward passes; it counts for nothing.
    drawn: of the last examples, which are prompts of the generator: `Sampled.drawn`.
    indices: of the others, their places in the data, where they are known.
    """

    examples: tuple[Example, ...]
    references: tuple[NDArray[np.float64], ...] | None
    idle: bool = False
    drawn: tuple[tuple[int, ...], ...] = ()
    indices: tuple[int, ...] = ()

    @property
    def preferences(self) -> tuple[Example, ...]:
        """The examples that come from the data as they are."""
        return self.examples[: len(self.examples) - len(self.drawn)]

    def reference(self, first_responses: int | None, device: torch.device) -> Tensor | None:
        """The reference sums of (the first) responses, (N,), example after example."""
        if self.references is None:
            return None
        return to_device(torch.from_numpy(np.concatenate([sums[:first_responses] for sums in self.references])), device)

    def alone(self) -> list[MicroBatch]:
        """Every example as a micro-batch of its own."""
        references = self.references or (None,) * len(self.examples)
        drawn = [()] * len(self.preferences) + [(each,) for each in self.drawn]
        return [
            MicroBatch((example,), None if sums is None else (sums,), drawn=each)
            for example, sums, each in zip(self.examples, references, drawn, strict=True)
        ]


@dataclass(frozen=True)
class PreferenceData:
    """Examples with what the reference says of them."""

    examples: Examples
    reference: ReferenceSums | None

    def microbatches(
        self, indices: Indices, *, tokens_per_microbatch: int, ranks: Ranks, sampled: Sequence[Sampled] = ()
    ) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch, samples among its pairs; every rank gets equally many."""
        pairs = len(indices)
        sizes = [int(size) for size in self.examples.sizes[indices]]
        sizes += [each.example.packed_tokens for each in sampled]
        return [
            self._microbatch(
                [int(indices[place]) for place in share.places if place < pairs],
                [sampled[place - pairs] for place in share.places if place >= pairs],
                idle=share.idle,
            )
            for share in shares(sizes, tokens_per_microbatch=tokens_per_microbatch, rank=ranks.rank, ranks=ranks.size)
        ]

    def _microbatch(self, indices: Sequence[int], sampled: Sequence[Sampled], *, idle: bool) -> MicroBatch:
        references = None
        if self.reference is not None:
            references = (*map(self.reference.of, indices), *(each.reference for each in sampled))
        return MicroBatch(
            examples=(*(self.examples[index] for index in indices), *(each.example for each in sampled)),
            references=references,
            idle=idle,
            drawn=tuple(each.drawn for each in sampled),
            indices=tuple(indices),
        )
