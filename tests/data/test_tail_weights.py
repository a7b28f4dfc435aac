"""LD-DPO's weights: of what one response has beyond the length of the other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.example import Example, IntArray
from dpo_cli.data.tail_weights import TailWeighted

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=8).map(lambda ids: np.array(ids, np.int32))


class Listed(list[Example]):
    @property
    def sizes(self) -> IntArray:
        return np.array([example.packed_tokens for example in self], dtype=np.int32)


@given(chosen=IDS, rejected=IDS, alpha=st.floats(0, 1, width=32))
def test_tokens_beyond_the_shorter_response_weigh_alpha(chosen: IntArray, rejected: IntArray, alpha: float) -> None:
    examples = Listed([Example(np.array([1], np.int32), (chosen, rejected), origin="row 1")])
    weighted = TailWeighted(examples, alpha)
    (example,) = [weighted[index] for index in range(len(weighted))]
    assert example.weights is not None
    for ids, weights in zip(example.responses, example.weights, strict=True):
        expected = [1.0 if place < min(len(chosen), len(rejected)) else alpha for place in range(len(ids))]
        assert weights.dtype == np.float32 and weights.tolist() == expected
    assert example.responses == (chosen, rejected) and example.origin == "row 1"
    assert weighted.sizes.tolist() == examples.sizes.tolist()


def test_weights_that_are_there_are_multiplied() -> None:
    ids = np.arange(4, dtype=np.int32)
    before = (np.array([2, 3, 4, 5], np.float32), np.array([6, 7], np.float32))
    weighted = TailWeighted(Listed([Example(ids[:1], (ids, ids[:2]), weights=before)]), 0.5)
    assert weighted[0].weights is not None
    assert [weights.tolist() for weights in weighted[0].weights] == [[2, 3, 2, 2.5], [6, 7]]


def test_responses_of_one_length_have_no_tail() -> None:
    ids = np.arange(3, dtype=np.int32)
    (weights, _) = TailWeighted(Listed([Example(ids, (ids, ids))]), 0.0)[0].weights or pytest.fail("no weights")
    assert weights.tolist() == [1, 1, 1]
