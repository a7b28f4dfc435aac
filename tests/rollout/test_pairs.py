"""Pairs are of different responses that stopped, right against wrong, and the same whenever they are made."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.rollout.answers import Answered, Response
from dpo_cli.rollout.pairs import as_row, best_worst_pairs, rewarded, verified_pairs
from dpo_cli.rollout.questions import Question


def answered(number: int, *responses: tuple[str, bool | None] | Response) -> Answered:
    made = [
        each if isinstance(each, Response) else Response(each[0], np.array([1, 0], np.int32), True, None, each[1])
        for each in responses
    ]
    question = Question(number, f"prompt {number}", "truth", f"row {number}")
    return Answered(question, np.array([5], np.int32), tuple(made))


def texts(found):
    return [(pair.chosen, pair.rejected) for pair in found.pairs]


def test_a_right_sample_is_set_against_a_wrong_one():
    found = verified_pairs([answered(0, ("a", False), ("b", True), ("c", False))], limit=1)
    assert texts(found) == [("b", "a")]


def test_every_sample_is_used_before_one_is_used_twice():
    samples = [answered(0, ("r1", True), ("w1", False), ("r2", True), ("w2", False), ("w3", False))]
    assert texts(verified_pairs(samples, limit=3)) == [("r1", "w1"), ("r2", "w2"), ("r1", "w3")]
    everything = texts(verified_pairs(samples, limit=100))
    assert sorted(everything) == sorted(itertools.product(["r1", "r2"], ["w1", "w2", "w3"]))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 40))
def test_no_pair_is_made_twice_whatever_the_limit(rights, wrongs, limit):
    samples = [answered(0, *((f"r{i}", True) for i in range(rights)), *((f"w{i}", False) for i in range(wrongs)))]
    found = texts(verified_pairs(samples, limit=limit))
    assert len(set(found)) == len(found) == min(limit, rights * wrongs)
    assert all(chosen[0] == "r" and rejected[0] == "w" for chosen, rejected in found)


def test_prompts_without_a_pair_are_counted_by_reason():
    cut = Response("no end", np.array([1], np.int32), False, None, False)
    empty = Response("", np.array([0], np.int32), True, None, False)
    found = verified_pairs(
        [
            answered(0, ("a", True), ("b", True)),
            answered(1, ("a", False)),
            answered(2, cut, empty),
            answered(3, ("a", True), cut),
            answered(4, ("a", True), ("b", False)),
            answered(5),
        ],
        limit=2,
    )
    assert texts(found) == [("a", "b")]
    assert found.without == {"wrong": 2, "right": 1, "usable": 2}
    assert found.prompts == 1


def test_the_same_text_twice_counts_once():
    samples = [answered(0, ("a", True), ("a", True), ("b", False), ("b", False))]
    assert texts(verified_pairs(samples, limit=9)) == [("a", "b")]


def test_chosen_responses_of_a_file_take_the_place_of_right_samples():
    samples = [
        answered(0, ("mine", True), ("wrong", False)),
        answered(1, ("mine", True)),
        answered(2, ("wrong", False)),
        answered(3, ("given ", False)),
    ]
    found = verified_pairs(samples, limit=2, chosen={0: "given", 1: "given", 2: None, 3: "given"})
    assert texts(found) == [("given", "wrong")]
    assert found.pairs[0].chosen_ids is None
    assert found.without == {"wrong": 2, "chosen": 1}


def test_the_best_is_set_against_the_worst_by_reward():
    samples = [answered(0, ("a", None), ("b", None), ("c", None), ("d", None)), answered(1, ("a", None), ("a", None))]
    rewards = {0: [0.5, -1.0, 2.0, 0.1]}
    assert [len(rewarded(each)) for each in samples] == [4, 1]
    assert texts(best_worst_pairs(samples, rewards, limit=1)) == [("c", "b")]
    assert texts(best_worst_pairs(samples, rewards, limit=5)) == [("c", "b"), ("a", "d")]
    assert best_worst_pairs(samples, rewards, limit=5).without == {"alike": 1}


def test_equal_rewards_are_no_preference():
    assert texts(best_worst_pairs([answered(0, ("a", None), ("b", None))], {0: [1.0, 1.0]}, limit=1)) == []


@pytest.mark.parametrize("chat", [False, True])
def test_rows_are_text_or_messages_as_training_reads_them(chat):
    (pair,) = verified_pairs([answered(0, ("a", True), ("b", False))], limit=1).pairs
    row = as_row(pair, chat=chat)
    assert list(row) == ["prompt", "chosen", "rejected"]
    if chat:
        assert row["prompt"] == [{"role": "user", "content": "prompt 0"}]
        assert row["chosen"] == [{"role": "assistant", "content": "a"}]
    else:
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("prompt 0", "a", "b")
