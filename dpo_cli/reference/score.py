"""Score once with the reference: look up, score what is missing, sum what the run needs.

    plan = plan_scoring(...)        which responses have no entry, and in which batches they are scored
    score_missing(plan, ...)        batch after batch into the store
    collect_sums(...)               float64 sums for the run to keep

`reference_sums` is the three in a row. Only `score_missing` needs a model, and asks for it only if there is work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.example import Example, Examples
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import Interrupted, StoreError
from dpo_cli.reference.keys import example_keys, key_array, key_bytes
from dpo_cli.reference.lookup import ScoringPlan, chunks, plan_scoring
from dpo_cli.reference.plan import Unit
from dpo_cli.reference.shards import Logps
from dpo_cli.reference.store import ReferenceStore
from dpo_cli.reference.sums import ReferenceSums, add_to_digest, weighted_sum

# Per example, per response, (tokens,) log-probs in nats. The examples of one call fit one forward pass.
Score = Callable[[Sequence[Example]], Sequence[Sequence[Logps]]]
# Called with the tokens scored so far and the tokens to score in all.
Progress = Callable[[int, int], None]


def reference_sums(
    examples: Examples,
    *,
    indices: NDArray[np.int64] | None = None,
    make_score: Callable[[], Score],
    store: ReferenceStore,
    tokens_per_batch: int,
    report: Callable[[str], None] = lambda line: None,
    planned: Callable[[ScoringPlan], None] = lambda plan: None,
    progress: Progress = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    flush_seconds: float = 30.0,
    ranks: Ranks | None = None,
) -> ReferenceSums:
    """Reference sums of `examples` (those at `indices`, or all), scoring what the store does not have yet.

    make_score: builds the scoring function; called at most once, and not at all when nothing is missing.
    report: gets the hit/miss line and a line for every damaged shard. planned: gets what that line tells, as numbers.
    ranks: all of them call this together; each scores its share, and all get the sums.
    Raises Interrupted once `should_stop` says so, after what was scored is on disk; StoreError for log-probs that are
    not finite, values that came with the data and cannot be used, and disks that refuse.

    The numbers are the bits of an uninterrupted pass whenever the pass was killed and repeated, and depend on the
    rows scored together otherwise: rows added to a data set later are computed in batches of their own. A run
    therefore keeps its sums (`ReferenceSums.save`) and resumes on those.
    """
    chosen = np.arange(len(examples)) if indices is None else np.unique(np.asarray(indices, dtype=np.int64))
    for message in store.damaged:
        report(message)
    ranks = ranks or SoleRank()
    plan = plan_scoring(examples, store, indices=chosen, tokens_per_batch=tokens_per_batch)
    # Another run may have added shards while some ranks had looked already: look again until all see the same.
    while len(set(ranks.gather(plan.digest))) > 1:
        store.refresh()
        plan = plan_scoring(examples, store, indices=chosen, tokens_per_batch=tokens_per_batch)
    report(plan.line(store))
    planned(plan)
    if plan.batches:
        score_missing(
            plan,
            examples,
            make_score(),
            store,
            progress=progress,
            should_stop=should_stop,
            flush_seconds=flush_seconds,
            ranks=ranks,
        )
        ranks.barrier()
    sums = None
    if ranks.is_main:
        _wait_until_visible(store, plan)
        sums = collect_sums(examples, store, indices=chosen)
    whole = ranks.broadcast(sums)
    assert whole is not None
    return whole


def score_missing(
    plan: ScoringPlan,
    examples: Examples,
    score: Score,
    store: ReferenceStore,
    *,
    progress: Progress = lambda done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    flush_seconds: float = 30.0,
    ranks: Ranks | None = None,
) -> None:
    """Score the plan's batches, largest first, into the store; each rank its share, in shards of its own.

    Largest first, so that running out of memory happens in the first second and not in the last.
    """
    ranks = ranks or SoleRank()
    names = key_bytes(plan.missing["key"])
    done, total = 0, plan.tokens
    largest_first = plan.batches[::-1]
    with store.writer(flush_seconds=flush_seconds) as writer:
        for start in range(0, len(largest_first), ranks.size):
            together = largest_first[start : start + ranks.size]
            if should_stop():
                raise Interrupted(
                    f"stopped while scoring the reference; {start:,} of {len(plan.batches):,} batches are kept.",
                    where=str(store.folder),
                    hint="start the same command again: it goes on from there",
                )
            # Where weights are partitioned no rank may sit out a forward pass: one without a batch repeats the last.
            idle = ranks.rank >= len(together)
            units = [plan.units[position] for position in together[-1 if idle else ranks.rank]]
            questions = [_unit_example(unit, plan, examples) for unit in units]
            answers = score(questions)
            done += sum(plan.units[position].size for batch in together for position in batch)
            progress(done, total)
            if idle:
                continue
            keys: list[bytes] = []
            logps: list[Logps] = []
            for unit, question, answer in zip(units, questions, answers, strict=True):
                keys += [names[member] for member in unit.members]
                logps += _checked(question, answer)
            writer.add(keys, logps)


def _wait_until_visible(store: ReferenceStore, plan: ScoringPlan, *, patience_seconds: float = 120.0) -> None:
    """Take in what other ranks have written; on a network file system it may be a while before it is seen."""
    deadline = time.monotonic() + patience_seconds
    store.refresh()
    while store.missing(plan.missing["key"]).any():
        if time.monotonic() > deadline:
            raise StoreError(
                "what other ranks have scored is not seen here.",
                where=str(store.folder),
                hint="store_dir= must be a folder that all machines share",
            )
        time.sleep(0.5)
        store.refresh()


def collect_sums(examples: Examples, store: ReferenceStore, *, indices: NDArray[np.int64]) -> ReferenceSums:
    """Sum the entries of `indices` (ascending), or what came with the rows, over tokens and with their weights."""
    whole = hashlib.blake2b(digest_size=16)
    counts: list[int] = []
    values: list[float] = []
    for chunk in chunks(indices):
        selected = [examples[index] for index in chunk]
        keys = [key for example in selected if example.reference is None for key in example_keys(example)]
        entries = iter(store.read(key_array(keys)))
        for example in selected:
            counts.append(len(example.responses))
            add_to_digest(whole, example)
            if example.reference is not None:
                values += brought_sums(example)
                continue
            for number in range(len(example.responses)):
                weights = None if example.weights is None else example.weights[number]
                values.append(weighted_sum(next(entries), weights))
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return ReferenceSums(np.asarray(indices, np.int64), offsets, np.array(values, np.float64), whole.hexdigest())


def brought_sums(example: Example) -> list[float]:
    """Sums of log-probs that came with a row, per token or already summed. Raises StoreError for unusable ones."""
    assert example.reference is not None
    sums = []
    for number, (given, ids) in enumerate(zip(example.reference, example.responses, strict=True)):
        weights = None if example.weights is None else example.weights[number]
        problem = None
        if not np.isfinite(given).all():
            problem = "are not finite numbers"
        elif len(given) == len(ids):
            sums.append(weighted_sum(given, weights))
        elif len(given) != 1:
            problem = f"are {len(given):,} values for {len(ids):,} tokens"
        elif weights is not None and (weights != 1).any():
            problem = "are sums, which token weights cannot be applied to any more"
        else:
            sums.append(float(given[0]))
        if problem:
            raise StoreError(
                f"the reference log-probs of response {number + 1} that came with this row {problem}.",
                where=example.origin,
                hint="leave these columns out of the data (they are then scored here), or mend them",
            )
    return sums


def _unit_example(unit: Unit, plan: ScoringPlan, examples: Examples) -> Example:
    """The unit as one prompt with its missing responses, which may come from several rows."""
    sources = [examples[int(plan.missing["example"][member])] for member in unit.members]
    numbers = [int(plan.missing["response"][member]) for member in unit.members]
    return Example(
        prompt=sources[0].prompt,
        responses=tuple(source.responses[number] for source, number in zip(sources, numbers, strict=True)),
        origin=sources[0].origin,
    )


def _checked(question: Example, answer: Sequence[Logps]) -> list[Logps]:
    for ids, logps in zip(question.responses, answer, strict=True):
        if logps.shape != ids.shape:
            raise ValueError(f"scored {logps.shape} log-probs for {ids.shape} tokens of {question.origin}")
        if not np.isfinite(logps).all():
            raise StoreError(
                "the reference model gives log-probs that are not finite.",
                where=question.origin,
                hint="check the model's weights, or try model.dtype=float32",
            )
    return list(answer)
