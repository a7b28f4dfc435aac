"""The reference log-probs a run trains against: one float64 sum a response, fixed for the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dpo_cli.atomic import replacing
from dpo_cli.data.example import Example, Examples, FloatArray
from dpo_cli.errors import CheckpointError
from dpo_cli.reference.keys import example_keys
from dpo_cli.reference.shards import Logps


@dataclass(frozen=True)
class ReferenceSums:
    """Sums over response tokens in nats, weighted by the examples' token weights.

    indices: (examples,) ascending, the examples they belong to. offsets: (examples + 1,) into `values`.
    values: (responses,) float64. data: what `data_digest` gave for the examples, hexadecimal.
    """

    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]
    values: NDArray[np.float64]
    data: str

    def of(self, index: int) -> NDArray[np.float64]:
        """(K,) sums of the responses of one example. Raises KeyError for an example that was not scored."""
        place = int(np.searchsorted(self.indices, index))
        if place == len(self.indices) or self.indices[place] != index:
            raise KeyError(f"example {index} has no reference log-probs")
        return self.values[self.offsets[place] : self.offsets[place + 1]]

    @property
    def digest(self) -> str:
        """32 hex digits over every bit of the content."""
        whole = hashlib.blake2b(self.data.encode(), digest_size=16)
        for array in (self.indices, self.offsets, self.values):
            whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    def covers(self, indices: NDArray[np.int64]) -> bool:
        return bool(np.isin(indices, self.indices).all())

    def with_values_of(self, earlier: ReferenceSums) -> ReferenceSums:
        """The same examples, those that `earlier` has with its very bits; `earlier` has no others."""
        values = self.values.copy()
        for index in earlier.indices.tolist():
            place = int(np.searchsorted(self.indices, index))
            values[self.offsets[place] : self.offsets[place + 1]] = earlier.of(index)
        return replace(self, values=values)

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all. Raises CheckpointError when the disk refuses."""
        tensors = {"indices": self.indices, "offsets": self.offsets, "values": self.values}
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"data": self.data, "digest": self.digest})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the reference values cannot be saved: {error}.", where=str(path)) from error

    @staticmethod
    def load(path: Path) -> ReferenceSums:
        """Read what `save` wrote, and prove it by its digest. Raises CheckpointError for anything else."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
            sums = ReferenceSums(tensors["indices"], tensors["offsets"], tensors["values"], metadata["data"])
            whole = sums.digest == metadata["digest"]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"the run's reference values cannot be read: {error}.", where=str(path)) from error
        if not whole:
            raise CheckpointError("the run's reference values are damaged.", where=str(path))
        return sums


def weighted_sum(logps: Logps, weights: FloatArray | None) -> float:
    """Sum over tokens in float64: a margin is a small difference of large sums."""
    values = logps.astype(np.float64)
    # No `@`: BLAS may add in another order on another number of threads.
    return float((values if weights is None else values * weights.astype(np.float64)).sum())


def data_digest(examples: Examples, indices: Sequence[int] | NDArray[np.int64]) -> str:
    """What the sums of these examples depend on besides the model: ids, token weights, values that came along.

    A resumed run compares it with the one saved, so that edited data is noticed before it trains on.
    """
    whole = hashlib.blake2b(digest_size=16)
    for index in indices:
        add_to_digest(whole, examples[int(index)])
    return whole.hexdigest()


def add_to_digest(whole: hashlib.blake2b, example: Example) -> None:
    """Feed one example; lengths go first, so that no two different examples feed the same bytes."""
    whole.update(len(example.responses).to_bytes(4, "little"))
    for key in example_keys(example):
        whole.update(key)
    for arrays in (example.weights, example.reference):
        for array in arrays or ():
            whole.update(len(array).to_bytes(4, "little"))
            whole.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        whole.update(b"-" if arrays is None else b"+")
