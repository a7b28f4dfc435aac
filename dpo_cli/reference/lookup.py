"""Look up what a run needs in the store, and plan the scoring of what is not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.example import Examples
from dpo_cli.reference.keys import KEY_DTYPE, example_keys, prompt_key
from dpo_cli.reference.plan import Unit, scoring_batches, scoring_units
from dpo_cli.reference.store import ReferenceStore

_EXAMPLES_AT_ONCE = 2048
_WANTED = np.dtype(
    [
        ("key", KEY_DTYPE),
        ("prompt", KEY_DTYPE),
        ("example", np.int64),
        ("response", np.int32),
        ("prompt_size", np.int32),
        ("response_size", np.int32),
    ]
)


@dataclass(frozen=True)
class ScoringPlan:
    """What is missing from the store, and how it will be scored.

    responses: how many the run needs, counting one as often as rows use it. brought: those whose log-probs came with
        the data. kept: those with an entry.
    missing: structured (missing,), each key once, with the place in the data where its ids are found.
    units: prompts with their missing responses, positions into `missing`. batches: positions into `units`.
    """

    responses: int
    brought: int
    kept: int
    missing: NDArray[np.void]
    units: tuple[Unit, ...]
    batches: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Packed tokens that the scoring pass will feed the model."""
        return sum(unit.size for unit in self.units)

    @property
    def hits(self) -> str:
        """What the run needs, and how much of it was there, in a few words."""
        brought = f", {self.brought:,} of the data's own" if self.brought else ""
        return f"{self.responses:,} responses, {self.kept:,} from the store{brought}, {len(self.missing):,} scored"

    @property
    def digest(self) -> str:
        """What is to be scored, in a few letters: equal where plans are."""
        return hashlib.blake2b(self.missing["key"].tobytes(), digest_size=8).hexdigest()

    def line(self, store: ReferenceStore) -> str:
        """Hit, miss and why, for the screen."""
        brought = f"{self.brought:,} came with the data, " if self.brought else ""
        why = ""
        if len(self.missing):
            new = f"not among the {len(store):,} scored with this model before"
            why = f": {new if len(store) else store.why_new}"
        return (
            f"reference: {self.responses:,} responses, {brought}{self.kept:,} kept from an earlier run, "
            f"{len(self.missing):,} to score (model {store.folder.name[:6]}){why}"
        )


def plan_scoring(
    examples: Examples, store: ReferenceStore, *, indices: NDArray[np.int64], tokens_per_batch: int
) -> ScoringPlan:
    """Find the responses without an entry and cut them into batches of at most `tokens_per_batch` packed tokens.

    Rows that brought their own log-probs need none. A response that several rows share is scored once.
    """
    responses = brought = kept = 0
    parts = [np.empty(0, _WANTED)]
    for chunk in chunks(indices):
        wanted: list[tuple[bytes, bytes, int, int, int, int]] = []
        for index in chunk:
            example = examples[index]
            responses += len(example.responses)
            if example.reference is not None:
                brought += len(example.responses)
                continue
            prompt = prompt_key(example.prompt)
            for number, (key, ids) in enumerate(zip(example_keys(example), example.responses, strict=True)):
                wanted.append((key, prompt, index, number, len(example.prompt), len(ids)))
        entries = np.array(wanted, dtype=_WANTED)
        absent = store.missing(entries["key"])
        kept += int((~absent).sum())
        parts.append(entries[absent])
    missing = np.concatenate(parts)
    missing = missing[np.unique(missing["key"], return_index=True)[1]]
    units = scoring_units(
        missing["prompt"],
        missing["prompt_size"],
        missing["key"],
        missing["response_size"],
        tokens_per_batch=tokens_per_batch,
    )
    batches = scoring_batches(
        [unit.size for unit in units], [unit.key for unit in units], tokens_per_batch=tokens_per_batch
    )
    return ScoringPlan(responses, brought, kept, missing, tuple(units), tuple(map(tuple, batches)))


def chunks(indices: NDArray[np.int64]) -> Iterator[list[int]]:
    """Examples are looked up and summed a few thousand at a time, so memory does not grow with the data."""
    for start in range(0, len(indices), _EXAMPLES_AT_ONCE):
        yield indices[start : start + _EXAMPLES_AT_ONCE].tolist()
