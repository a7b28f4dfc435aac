"""Tokenised examples on disk, as an Arrow file that is read through a memory map, without copies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_cli.data.example import Example, FloatArray, IntArray

_TOKENS = pa.large_list(pa.int32())
_FLOATS = pa.large_list(pa.float32())
# Responses lie end to end with their lengths beside them: one list a row reads faster than a list of lists.
SCHEMA = pa.schema(
    [
        pa.field("prompt", _TOKENS),
        pa.field("responses", _TOKENS),
        pa.field("lengths", _TOKENS),
        pa.field("weights", _FLOATS),
        pa.field("reference", _FLOATS),
        pa.field("reference_lengths", _TOKENS),
        pa.field("desirable", pa.int8()),
        pa.field("source", pa.int32()),
        pa.field("number", pa.int64()),
        pa.field("prompt_key", pa.int64()),
        pa.field("row_key", pa.int64()),
    ]
)
_LISTS = ("prompt", "responses", "lengths", "weights", "reference", "reference_lengths")
_SCALARS = ("desirable", "source", "number", "prompt_key", "row_key")
_NO_VERDICT = -1
# A reader holds about 10 KiB for every batch of a file; a writer, what waits to become one.
_ROWS_TOGETHER = 8192
_BYTES_TOGETHER = 16 << 20


class StoredRow(NamedTuple):
    """One example as it is written. number: its row in the source; the keys are equal for equal prompts or rows."""

    prompt: IntArray
    responses: tuple[IntArray, ...]
    weights: tuple[FloatArray, ...] | None
    desirable: bool | None
    reference: tuple[FloatArray, ...] | None
    number: int
    prompt_key: int
    row_key: int


def record_batch(rows: Sequence[StoredRow], source: int) -> pa.RecordBatch:
    def lists(values: Sequence[NDArray[Any]], value_type: Any) -> pa.Array:
        offsets = np.zeros(len(values) + 1, dtype=np.int64)
        np.cumsum([len(each) for each in values], out=offsets[1:])
        flat = np.concatenate(values) if len(values) else np.zeros(0)
        return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=value_type))

    def joined(parts: tuple[NDArray[Any], ...] | None, dtype: Any) -> NDArray[Any]:
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    def lengths(parts: tuple[NDArray[Any], ...] | None) -> IntArray:
        return np.array([len(part) for part in parts or ()], dtype=np.int32)

    return pa.RecordBatch.from_arrays(
        [
            lists([row.prompt for row in rows], pa.int32()),
            lists([joined(row.responses, np.int32) for row in rows], pa.int32()),
            lists([lengths(row.responses) for row in rows], pa.int32()),
            lists([joined(row.weights, np.float32) for row in rows], pa.float32()),
            lists([joined(row.reference, np.float32) for row in rows], pa.float32()),
            lists([lengths(row.reference) for row in rows], pa.int32()),
            pa.array([_NO_VERDICT if row.desirable is None else int(row.desirable) for row in rows], type=pa.int8()),
            pa.array([source] * len(rows), type=pa.int32()),
            pa.array([row.number for row in rows], type=pa.int64()),
            pa.array([row.prompt_key for row in rows], type=pa.int64()),
            pa.array([row.row_key for row in rows], type=pa.int64()),
        ],
        schema=SCHEMA,
    )


class ExampleWriter:
    """Writes record batches, small ones together, and keeps a digest of their content that no batching changes."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        # Where an example came from is not part of what it teaches.
        names = (*_LISTS, *(f"{name} lengths" for name in _LISTS), "desirable")
        self._hashes = {name: hashlib.sha256() for name in names}
        self._waiting: list[pa.RecordBatch] = []
        self._rows_waiting = self._bytes_waiting = 0
        self.examples = 0

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        self._waiting.append(batch)
        # Counted as they come: a split of few rows gets thousands of batches of one row each.
        self._rows_waiting += batch.num_rows
        self._bytes_waiting += batch.nbytes
        if self._rows_waiting >= _ROWS_TOGETHER or self._bytes_waiting >= _BYTES_TOGETHER:
            self._write_waiting()
        self.examples += batch.num_rows
        for name in _LISTS:
            column = batch.column(name)
            self._hashes[f"{name} lengths"].update(np.diff(column.offsets.to_numpy()).tobytes())
            self._hashes[name].update(column.values.to_numpy().tobytes())
        self._hashes["desirable"].update(batch.column("desirable").to_numpy().tobytes())

    def _write_waiting(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
            self._waiting = []
            self._rows_waiting = self._bytes_waiting = 0

    def close(self) -> str:
        """Finish the file; return the digest of its content."""
        self._write_waiting()
        self._writer.close()
        self._file.close()
        together = "".join(digest.hexdigest() for digest in self._hashes.values())
        return hashlib.sha256(f"{self.examples}:{together}".encode()).hexdigest()


@dataclass(frozen=True)
class _Lists:
    """A column of lists in one batch: row i is values[offsets[i]:offsets[i + 1]]."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def row_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


class StoredExamples:
    """Examples of an Arrow file; arrays are read-only views of its memory map.

    sources: the name of each source, for an example's origin.
    partners: for unpaired examples the index of the one whose response is borrowed for KTO's divergence estimate.
    max_tokens: to which such a borrowed response is cut, together with the prompt it is put after.
    """

    def __init__(
        self, path: Path, sources: Sequence[str], *, max_tokens: int, partners: NDArray[np.int64] | None = None
    ) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._sources = tuple(sources)
        self._max_tokens = max_tokens
        self._partners = partners
        self._batches: list[dict[str, Any]] = []
        starts = [0]
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            columns: dict[str, Any] = {}
            # Arrow's own to_numpy imports pandas, a third of a second at every start.
            for name in _LISTS:
                column = batch.column(name)
                values: NDArray[Any] = np.from_dlpack(column.values)
                offsets: NDArray[Any] = np.from_dlpack(column.offsets)
                columns[name] = _Lists(values, offsets)
            for name in _SCALARS:
                columns[name] = np.from_dlpack(batch.column(name))
            self._batches.append(columns)
            starts.append(starts[-1] + batch.num_rows)
        self._starts = np.array(starts, dtype=np.int64)
        self._sizes = self._measure()

    @property
    def sizes(self) -> IntArray:
        return self._sizes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        columns, row = self._locate(index)
        prompt = columns["prompt"][row]
        lengths = columns["lengths"][row]
        responses = _cut_up(columns["responses"][row], lengths)
        if self._partners is not None:
            responses = (responses[0], self._borrowed(int(self._partners[index]), len(prompt)))
        weights = columns["weights"][row]
        reference = columns["reference"][row]
        verdict = int(columns["desirable"][row])
        return Example(
            prompt=prompt,
            responses=responses,
            weights=_cut_up(weights, lengths) if len(weights) else None,
            desirable=None if verdict == _NO_VERDICT else bool(verdict),
            reference=_cut_up(reference, columns["reference_lengths"][row]) if len(reference) else None,
            origin=f"{self._sources[int(columns['source'][row])]} row {int(columns['number'][row])}",
        )

    def column(self, name: str) -> NDArray[Any]:
        """A column of plain numbers, whole: source, number, desirable, prompt_key or row_key."""
        parts = [columns[name] for columns in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def lengths(self, name: str) -> NDArray[np.int64]:
        """How many values each row of a column of lists has."""
        parts = [columns[name].row_lengths for columns in self._batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def response_tokens(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of every example's first response, and of its last."""
        first, last = [], []
        for columns in self._batches:
            lengths: _Lists = columns["lengths"]
            first.append(lengths.values[lengths.offsets[:-1]])
            last.append(lengths.values[lengths.offsets[1:] - 1])
        empty = np.zeros(0, dtype=np.int64)
        return (np.concatenate(first), np.concatenate(last)) if first else (empty, empty)

    def _locate(self, index: int) -> tuple[dict[str, Any], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._batches[batch], index - int(self._starts[batch])

    def _borrowed(self, partner: int, prompt_tokens: int) -> IntArray:
        columns, row = self._locate(partner)
        response: IntArray = columns["responses"][row]
        return response[: max(1, self._max_tokens - prompt_tokens)]

    def _measure(self) -> IntArray:
        prompts = self.lengths("prompt")
        responses = self.lengths("responses")
        if self._partners is not None:
            room = np.maximum(1, self._max_tokens - prompts)
            responses = responses + np.minimum(responses[self._partners], room)
        return (prompts + responses).astype(np.int32)


def _cut_up(flat: NDArray[Any], lengths: IntArray) -> tuple[NDArray[Any], ...]:
    parts, start = [], 0
    for length in lengths.tolist():
        parts.append(flat[start : start + length])
        start += length
    return tuple(parts)


def partners_with_other_prompts(prompt_keys: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """For each example one of the next prompt, cyclically; None when all prompts are the same.

    Of a prompt with several rows, such as the two sides of a pair, the first lends its response to the first row of
    the prompt before it, the second to the second: always the first would leave out all rejected responses.
    """
    count = len(prompt_keys)
    around = np.concatenate([prompt_keys] * 4)  # enough that every run of equal keys below begins and ends inside
    changes = np.nonzero(around[1:] != around[:-1])[0] + 1  # where a run of another prompt begins
    if not len(changes):
        return None
    here = np.arange(count) + count
    own = np.searchsorted(changes, here, side="right")
    began, following, ended = changes[own - 1], changes[own], changes[own + 1]
    return ((following + (here - began) % (ended - following)) % count).astype(np.int64)
