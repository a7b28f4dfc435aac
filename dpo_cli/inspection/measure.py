"""One pass over tokenised examples: what only all rows together show, and the lengths that cost follows from."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.batch.order import epoch_order, global_batch, steps_per_epoch
from dpo_cli.batch.plan import microbatches
from dpo_cli.data.arrow_store import StoredExamples
from dpo_cli.data.example import Example, IntArray
from dpo_cli.data.report import Count
from dpo_cli.inspection.similar import near_duplicates, without_frame
from dpo_cli.losses.types import ExampleKind

Lengths = NDArray[np.int64]
# Preference pairs that a trainer which pads is given at once, to compare with: TRL's default.
PADDED_BATCH = 8
# Enough steps that the share of filled tokens is known to a percent.
_STEPS_PLANNED = 50


@dataclass(frozen=True)
class Ends:
    """The tokens that a reply may end with, and the one that text begins with, if any."""

    stops: frozenset[int]
    bos: int | None


@dataclass(frozen=True)
class SplitFacts:
    """found: by finding, the rows it holds of. prompt, best, worst: tokens of each example; one response is both.

    attended: query-key pairs of all examples, which attention's share of the work follows from.
    """

    found: dict[str, Count]
    prompt: Lengths
    best: Lengths
    worst: Lengths
    sizes: IntArray
    attended: float


def measure(
    examples: StoredExamples, *, kind: ExampleKind, ends: Ends, similarity: float | None, tokens_per_microbatch: int
) -> SplitFacts:
    """similarity: least overlap of near-duplicates; None looks for none."""
    said = _Said()
    found = {name: Count() for name in ("two_bos", "unended", "over_budget")}
    attended = 0.0
    sizes = examples.sizes
    distinct = _first_of_each(examples, "source", "number", "row_key")
    taken_again = set(range(len(examples))) - set(distinct.tolist()) if len(distinct) < len(examples) else set()
    for at in range(len(examples)):
        example = examples[at]
        prompt = len(example.prompt)
        attended += prompt**2 / 2 + sum(len(ids) * prompt + len(ids) ** 2 / 2 for ids in example.responses)
        if at in taken_again:
            continue
        own = _own_responses(example, kind)
        said.add(at, example, own, kind)
        if ends.bos is not None and prompt > 1 and example.prompt[0] == example.prompt[1] == ends.bos:
            found["two_bos"].add(example.origin)
        if any(int(ids[-1]) not in ends.stops for ids in own):
            found["unended"].add(example.origin)
        if sizes[at] > tokens_per_microbatch:
            found["over_budget"].add(example.origin)
    found["contradictions"] = said.contradictions(examples)
    earlier = _earlier(examples.column("row_key")[distinct])
    found["duplicates"] = _pairs(examples, distinct, np.where(earlier < 0, -1, distinct[earlier]))
    if similarity is not None:
        unlike = distinct[earlier < 0]
        found["near_duplicates"] = _near_duplicates(examples, unlike, kind, similarity)
    best, worst = examples.response_tokens()
    return SplitFacts(found, examples.lengths("prompt"), best, worst, sizes, attended)


def overlap(train: StoredExamples, held_out: StoredExamples, *, similarity: float | None) -> dict[str, Count]:
    """Held-out rows whose prompt is, or nearly is, one of training; nearly is asked of every prompt once."""
    keys, first = np.unique(train.column("prompt_key"), return_index=True)
    own = _first_of_each(held_out, "source", "number", "row_key")
    asked = held_out.column("prompt_key")[own]
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    known = keys[place] == asked
    found = {"overlap": Count()}
    for at, trained in zip(own[known].tolist(), first[place[known]].tolist(), strict=True):
        found["overlap"].add(_beside(held_out[at].origin, "is", train[trained].origin))
    if similarity is None:
        return found
    new = own[~known]
    new = new[np.sort(np.unique(held_out.column("prompt_key")[new], return_index=True)[1])]
    first = np.sort(first)
    prompt_of = without_frame(
        len(first) + len(new),
        lambda at: (train[int(first[at])] if at < len(first) else held_out[int(new[at - len(first)])]).prompt,
    )
    like = near_duplicates(
        len(first) + len(new), lambda at: (prompt_of(at),), threshold=similarity, first_asked=len(first)
    )[len(first) :]
    found["near_overlap"] = Count()
    for at, trained in zip(new.tolist(), like.tolist(), strict=True):
        if 0 <= trained < len(first):
            found["near_overlap"].add(_beside(held_out[at].origin, "is like", train[int(first[trained])].origin))
    return found


@dataclass
class _Said:
    """What rows say: that of two responses to a prompt one is better; of a single one, that it is good or is not."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    better: array[int] = field(default_factory=lambda: array("Q"))
    worse: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, at: int, example: Example, responses: tuple[IntArray, ...], kind: ExampleKind) -> None:
        if kind == "demonstration":
            return
        hashes = [_hash(ids) for ids in responses]
        if kind == "unpaired":
            hashes = [hashes[0], 0] if example.desirable else [0, hashes[0]]
        for better, worse in combinations(hashes, 2):
            self.rows.append(at)
            self.prompts.append(_hash(example.prompt))
            self.better.append(better)
            self.worse.append(worse)

    def contradictions(self, examples: StoredExamples) -> Count:
        """Rows that an earlier row contradicts, each once."""
        found = Count()
        prompts, better, worse = (np.array(each, dtype=np.uint64) for each in (self.prompts, self.better, self.worse))
        if not len(prompts):
            return found
        rows = np.array(self.rows)
        here, there = _joined(prompts, better, worse), _joined(prompts, worse, better)
        keys, first = np.unique(here, return_index=True)
        place = np.minimum(np.searchsorted(keys, there), len(keys) - 1)
        opposite = rows[first[place]]
        clash = (keys[place] == there) & (opposite < rows)
        seen: set[int] = set()
        for at, other in zip(rows[clash].tolist(), opposite[clash].tolist(), strict=True):
            if at not in seen:
                seen.add(at)
                found.add(_beside(examples[at].origin, "against", examples[other].origin))
        return found


def _joined(*keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One key of several, whose order counts."""
    joined = np.zeros(len(keys[0]), dtype=np.uint64)
    for each in keys:
        joined = (joined ^ each) * np.uint64(0x9E3779B97F4A7C15)
        joined ^= joined >> np.uint64(29)
    return joined


def _hash(ids: IntArray) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _own_responses(example: Example, kind: ExampleKind) -> tuple[IntArray, ...]:
    """Without the one that KTO borrows of another row."""
    return example.responses[:1] if kind == "unpaired" else example.responses


def _first_of_each(examples: StoredExamples, *columns: str) -> NDArray[np.int64]:
    """Ascending places of examples that are not the same row again, taken twice for its weight."""
    places = np.stack([examples.column(name).astype(np.int64) for name in columns], axis=1)
    return np.sort(np.unique(places, axis=0, return_index=True)[1])


def _earlier(keys: NDArray[Any]) -> NDArray[np.int64]:
    """For each key the place of the first that is equal, -1 for the first itself."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earlier = first[inverse]
    return np.where(earlier < np.arange(len(keys)), earlier, -1)


def _pairs(examples: StoredExamples, places: NDArray[np.int64], earlier: NDArray[np.int64]) -> Count:
    found = Count()
    for at, other in zip(places[earlier >= 0].tolist(), earlier[earlier >= 0].tolist(), strict=True):
        found.add(_beside(examples[at].origin, "after", examples[other].origin))
    return found


def _beside(origin: str, stands: str, other: str) -> str:
    """Two places in words; a file that both are of is named once."""
    (file, _, _), (other_file, _, other_row) = origin.rpartition(" row "), other.rpartition(" row ")
    return f"{origin} {stands} {f'row {other_row}' if other_file == file else other}"


def _near_duplicates(
    examples: StoredExamples, places: NDArray[np.int64], kind: ExampleKind, similarity: float
) -> Count:
    prompt_of = without_frame(len(places), lambda at: examples[int(places[at])].prompt)

    def parts_of(at: int) -> tuple[IntArray, ...]:
        return (prompt_of(at), *_own_responses(examples[int(places[at])], kind))

    like = near_duplicates(len(places), parts_of, threshold=similarity)
    return _pairs(examples, places, np.where(like < 0, -1, places[like]))


@dataclass(frozen=True)
class Packing:
    """Tokens of an epoch. packed: each prompt once, no padding.

    padded: of pairs, every response with a prompt of its own, padded to the longest of PADDED_BATCH pairs; else None.
    micro_batches: of an optimiser step, on average; filled: their tokens as a share of tokens_per_microbatch.
    """

    packed: int
    padded: int | None
    micro_batches: float
    filled: float


def packing(
    facts: SplitFacts, *, kind: ExampleKind, seed: int, global_pairs: int, tokens_per_microbatch: int
) -> Packing:
    examples = len(facts.sizes)
    steps = min(_STEPS_PLANNED, steps_per_epoch(examples, global_pairs))
    cut = tokens = 0
    for step in range(steps):
        batch = global_batch(step, seed=seed, examples=examples, global_pairs=global_pairs)
        sizes = facts.sizes[batch].tolist()
        cut += len(microbatches(sizes, tokens_per_microbatch=tokens_per_microbatch))
        tokens += sum(sizes)
    return Packing(
        packed=int(facts.sizes.sum()),
        padded=_padded(facts, epoch_order(seed, 0, examples)) if kind == "pair" else None,
        micro_batches=cut / steps,
        filled=tokens / (cut * tokens_per_microbatch),
    )


def _padded(facts: SplitFacts, order: NDArray[np.int64]) -> int:
    longest = (facts.prompt + np.maximum(facts.best, facts.worst))[order]
    starts = np.arange(0, len(order), PADDED_BATCH)
    pairs = np.diff(np.append(starts, len(order)))
    return int((2 * pairs * np.maximum.reduceat(longest, starts)).sum())
