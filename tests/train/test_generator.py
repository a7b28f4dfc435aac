"""What the policy writes: who answers when, what counts, and that nothing is lost or drawn twice."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_cli.data.example import Example
from dpo_cli.data.generator import Selected, Truths, split_by_prompt
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import DataError
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.rollout.answers import check_room, with_room
from dpo_cli.train.generator import Generator, GeneratorBatch, GeneratorSettings
from dpo_cli.train.metrics_log import MetricsLog, read_metrics
from dpo_cli.train.micro_batch import Sampled

STOP = 9
SETTINGS = GeneratorSettings(
    seed=3, total_steps=20, prompts_per_step=4, refresh_every=1, keep_cut=False, tokens_per_microbatch=40,
    shown_per_step=2, stop_token_ids=frozenset({STOP}),
)  # fmt: skip


class Listed(list[Example]):
    @property
    def sizes(self) -> Any:
        return np.array([example.packed_tokens for example in self], dtype=np.int32)


def ids(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.int32)


def truths(count: int = 11) -> Listed:
    return Listed(
        Example(ids(*range(1, 2 + number % 5)), (ids(7, number % 6, STOP),), origin=f"row {number}")
        for number in range(count)
    )


def answer(prompt: Any, stream: int, sample: int) -> Any:
    """A stand-in for a policy: what is written is a function of the prompt and its random numbers alone."""
    random = np.random.default_rng([stream % 2**63, sample, len(prompt)])
    written = random.integers(0, STOP, random.integers(1, 6))
    return np.append(written, STOP if random.random() < 0.7 else 0).astype(np.int32)


@dataclasses.dataclass
class Author:
    """Counts how often it is asked."""

    samples: int = 2
    asked: int = 0

    def respond(self, prompts: Sequence[Any], streams: Sequence[int], truths: Sequence[Any]) -> list[list[Any]]:
        self.asked += len(prompts)
        return [[answer(p, s, k) for k in range(self.samples)] for p, s in zip(prompts, streams, strict=True)]

    @staticmethod
    def score(examples: Sequence[Example]) -> list[list[Any]]:
        return [[-response.astype(np.float32) - len(e.prompt) for response in e.responses] for e in examples]


def generator(path: Path, author: Author, ranks: Ranks | None = None, **settings: Any) -> Generator:
    rows = truths()
    return Generator(
        settings=dataclasses.replace(SETTINGS, **settings),
        truths=rows,
        reference=ReferenceSums(np.arange(len(rows)), np.arange(len(rows) + 1), -np.arange(len(rows)) - 0.5, data=""),
        ranks=ranks or SoleRank(),
        device=torch.device("cpu"),
        respond=author.respond,
        score=author.score,
        decode=str,
        log=MetricsLog(path / "samples.jsonl"),
    )


def plain(batch: GeneratorBatch) -> list[Any]:
    return [
        (each.example.origin, [list(r) for r in each.example.responses], list(each.reference), each.drawn)
        for each in batch.sampled
    ]


def samples_of(each: Sampled) -> list[Any]:
    return [each.example.responses[place] for place in each.drawn]


def scored_by_hand(example: Example, response: Any) -> float:
    return -(float(response.sum()) + len(response) * len(example.prompt))


def test_every_sample_stands_beside_its_truth_with_the_references_of_both(tmp_path: Path) -> None:
    for step in range(6):
        batch = generator(tmp_path, Author()).batch(step)
        assert batch.sampled
        for example, reference, drawn in batch.sampled:
            number = int(example.origin.removeprefix("row "))
            assert list(example.responses[0]) == [7, number % 6, STOP]
            assert reference[0] == -number - 0.5
            assert list(reference[1:]) == [scored_by_hand(example, r) for r in example.responses[1:]]
            assert drawn == (1, 2)[: len(drawn)]


def test_samples_that_never_ended_are_counted_and_left_out_unless_they_are_kept(tmp_path: Path) -> None:
    whole = generator(tmp_path, Author(), keep_cut=True).batch(0)
    ended = generator(tmp_path, Author()).batch(0)
    everything = [r for each in whole.sampled for r in samples_of(each)]
    assert len(everything) == 8
    assert {r[-1] == STOP for r in everything} == {True, False}
    kept = [list(r) for each in ended.sampled for r in samples_of(each)]
    assert kept == [list(r) for r in everything if r[-1] == STOP]
    for batch in (whole, ended):
        means = batch.metrics.means()
        assert means["generator/eos_rate"] == len(kept) / 8
        assert means["generator/length"] == np.mean([len(r) for r in everything])


def test_what_is_said_twice_is_scored_once_and_goes_through_the_model_once(tmp_path: Path) -> None:
    """A sample that repeats its truth has the truth's place and reference, one that repeats another has the other's."""
    cut = ids(5, 5)

    class Repeating(Author):
        scored: ClassVar[list[int]] = []

        def respond(self, prompts: Sequence[Any], streams: Sequence[int], truths: Sequence[Any]) -> list[list[Any]]:
            return [[ids(4, STOP), truth.copy(), cut, ids(4, STOP), ids(6, STOP), cut] for truth in truths]

        @classmethod
        def score(cls, examples: Sequence[Example]) -> list[list[Any]]:
            cls.scored += [len(example.responses) for example in examples]
            return Author.score(examples)

    for each in generator(tmp_path, Repeating()).batch(0).sampled:
        number = int(each.example.origin.removeprefix("row "))
        truth = ids(7, number % 6, STOP)
        assert [list(r) for r in each.example.responses] == [list(truth), [4, STOP], [6, STOP]]
        assert each.drawn == (1, 0, 1, 2)
        scored = [scored_by_hand(each.example, response) for response in (ids(4, STOP), ids(6, STOP))]
        assert list(each.reference) == [-number - 0.5, *scored]
    assert Repeating.scored == [2] * 4


def test_a_policy_that_never_ends_leaves_nothing_to_learn_from(tmp_path: Path) -> None:
    class Endless(Author):
        def respond(self, prompts: Sequence[Any], streams: Sequence[int], truths: Sequence[Any]) -> list[list[Any]]:
            return [[ids(1, 2, 3)] for _ in prompts]

    batch = generator(tmp_path, Endless()).batch(0)
    assert batch.sampled == ()
    assert batch.metrics.means()["generator/eos_rate"] == 0


def test_prompts_are_gone_through_again_and_again_each_as_often_as_the_others(tmp_path: Path) -> None:
    one = generator(tmp_path, Author(), keep_cut=True, total_steps=22)
    seen = [each.example.origin for step in range(22) for each in one.batch(step).sampled]
    assert len(seen) == 88
    assert {seen.count(f"row {number}") for number in range(11)} == {8}
    assert sorted(seen[:11]) != seen[:11] and len(set(seen[:11])) == 11


def test_no_two_steps_draw_the_same_for_a_prompt(tmp_path: Path) -> None:
    one = generator(tmp_path, Author(), keep_cut=True)
    drawn: dict[str, list[Any]] = {}
    for step in range(12):
        for each in one.batch(step).sampled:
            drawn.setdefault(each.example.origin, []).append([list(r) for r in samples_of(each)])
    assert all(first != second for first, second, *_ in drawn.values())


def test_a_round_serves_several_steps_and_tells_how_old_its_samples_are(tmp_path: Path) -> None:
    author = Author()
    one = generator(tmp_path, author, refresh_every=3, total_steps=5)
    asked, staleness = [], []
    for step in range(5):
        staleness.append(one.batch(step).metrics.means()["generator/staleness"])
        asked.append(author.asked)
    assert asked == [12, 12, 12, 20, 20], "the last round answers no prompts of steps that never come"
    assert staleness == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("stopped_after", range(1, 6))
def test_a_resumed_run_goes_on_with_the_samples_that_waited(tmp_path: Path, stopped_after: int) -> None:
    whole = generator(tmp_path, Author(), refresh_every=3)
    expected = [plain(whole.batch(step)) for step in range(7)]
    first, author = generator(tmp_path, Author(), refresh_every=3), Author()
    for step in range(stopped_after):
        first.batch(step)
    saved = {name: tensor.clone() for _, name, tensor in first.saved_tensors()}
    assert bool(saved) == (stopped_after % 3 != 0)
    second = generator(tmp_path, author, refresh_every=3)
    second.load(saved)
    assert [plain(second.batch(step)) for step in range(stopped_after, 7)] == expected[stopped_after:]


def test_some_samples_of_a_step_are_kept_for_reading(tmp_path: Path) -> None:
    one = generator(tmp_path, Author())
    for step in range(3):
        one.batch(step)
    one.log.close()
    rows = list(read_metrics(tmp_path / "samples.jsonl"))
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert set(rows[0]) == {"step", "origin", "prompt", "truth", "samples", "ended", "drawn_after_step"}
    assert len(rows[0]["samples"]) == len(rows[0]["ended"]) == 2
    json.dumps(rows)


class Threads:
    """Ranks as threads of one process, which meet at a barrier; enough to see who does what."""

    def __init__(self, size: int) -> None:
        self.size, self.board = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def rank(self, number: int) -> Any:
        return _ThreadRank(self, number)


class _ThreadRank(SoleRank):
    def __init__(self, threads: Threads, number: int) -> None:
        self.rank, self.size, self.is_main, self._threads = number, threads.size, number == 0, threads

    def gather(self, value: Any) -> list[Any]:
        self._threads.board[self.rank] = value
        self._threads.barrier.wait()
        told = list(self._threads.board)
        self._threads.barrier.wait()
        return told


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_share_the_work_and_all_hold_the_same_samples_as_one_process(tmp_path: Path, size: int) -> None:
    single = generator(tmp_path, Author())
    expected = [plain(single.batch(step)) for step in range(4)]
    threads, found, authors = Threads(size), {}, [Author() for _ in range(size)]

    def work(rank: int) -> None:
        one = generator(tmp_path, authors[rank], threads.rank(rank))
        found[rank] = [plain(one.batch(step)) for step in range(4)]

    running = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert found == dict.fromkeys(range(size), expected)
    assert sum(author.asked for author in authors) == 16


# --- the generator's share of the data -------------------------------------------------------------------------------


def test_prompts_are_shared_out_whole_by_the_fraction_asked_for() -> None:
    keys = np.repeat(np.random.default_rng(0).integers(-(2**63), 2**63, 500), 3)
    ours, theirs = split_by_prompt(keys, 0.2, seed=1)
    assert len(theirs) == 300 and len(ours) == 1200
    assert not set(keys[ours]) & set(keys[theirs])
    assert sorted([*ours, *theirs]) == list(range(1500))
    assert not np.array_equal(theirs, split_by_prompt(keys, 0.2, seed=2)[1])


@pytest.mark.parametrize(("prompts", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (1, 0.5, 0), (10, 0.0, 0)])
def test_both_sides_get_a_prompt_where_there_are_two(prompts: int, share: float, expected: int) -> None:
    ours, theirs = split_by_prompt(np.arange(prompts, dtype=np.int64), share, seed=0)
    assert (len(ours), len(theirs)) == (prompts - expected, expected)


def test_prompts_that_leave_no_room_for_a_sample_are_told_apart() -> None:
    config = Qwen2Config(
        vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    policy, rows = Qwen2ForCausalLM(config), Truths(truths(10))
    fitting = Selected(rows, np.array(with_room(policy, rows.prompt_tokens, 5)))
    assert [len(fitting[i].prompt) for i in range(len(fitting))] == [1, 2, 3, 1, 2, 3]
    assert list(fitting.sizes) == [fitting[i].packed_tokens for i in range(len(fitting))]
    check_room(policy, rows.prompt_tokens, 7, key="rollout.max_new_tokens")
    with pytest.raises(DataError, match="no prompt leaves room for 8 new tokens; the shortest has 1") as caught:
        check_room(policy, rows.prompt_tokens, 8, key="rollout.max_new_tokens")
    assert caught.value.hint == "rollout.max_new_tokens=5"


def test_a_truth_is_the_first_response_alone() -> None:
    pair = Example(
        ids(1, 2), (ids(3, STOP), ids(4, 5, STOP)), origin="row 1",
        weights=(np.ones(2, np.float32), np.ones(3, np.float32)),
        reference=(np.array([-1.0], np.float32), np.array([-2.0], np.float32)),
    )  # fmt: skip
    (only,) = [Truths(Listed([pair]))[0]]
    assert [list(r) for r in only.responses] == [[3, STOP]]
    assert only.weights is None and only.reference is not None and list(only.reference[0]) == [-1.0]
