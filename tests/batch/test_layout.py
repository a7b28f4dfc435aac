"""The packed row holds every prompt once and says exactly who predicts whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.batch.layout import PackedRow, Segment, pack, sum_by_response, tokens_by_response
from dpo_cli.data.example import Example

ids = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(lambda values: np.array(values, np.int32))
examples = st.lists(
    st.builds(Example, prompt=ids, responses=st.lists(ids, min_size=1, max_size=4).map(tuple), weights=st.none()),
    min_size=1,
    max_size=5,
)


def visible_history(row: PackedRow, position: int) -> list[tuple[int, int]]:
    """(position id, token) of everything a position of the row attends to, from the segments alone."""
    (segment,) = [s for s in row.segments if s.query_start <= position < s.query_end]
    places = [*range(segment.prefix_start, segment.prefix_end), *range(segment.query_start, position + 1)]
    return [(int(row.position_ids[place]), int(row.input_ids[place])) for place in places]


@given(examples)
def test_every_response_token_is_predicted_from_its_own_prompt_and_past_alone(batch: list[Example]) -> None:
    row = pack(batch)
    cursor = 0
    for example in batch:
        for response in example.responses:
            whole = [*example.prompt.tolist(), *response.tolist()]
            for place, target in enumerate(response.tolist()):
                assert int(row.targets[cursor]) == target
                seen = visible_history(row, int(row.predictors[cursor]))
                assert seen == list(enumerate(whole[: len(example.prompt) + place]))
                cursor += 1
    assert cursor == len(row.targets)


@given(examples)
def test_segments_cover_the_row_once_and_in_order(batch: list[Example]) -> None:
    row = pack(batch)
    covered = [place for segment in row.segments for place in range(segment.query_start, segment.query_end)]
    assert covered == list(range(len(row.input_ids)))


@given(examples)
def test_a_prompt_is_stored_once_however_many_responses_share_it(batch: list[Example]) -> None:
    expected = sum(len(e.prompt) + sum(len(r) - 1 for r in e.responses) for e in batch)
    assert len(pack(batch).input_ids) == expected


def test_a_pair_looks_like_the_picture() -> None:
    example = Example(
        prompt=np.array([1, 2, 3, 4], np.int32),
        responses=(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)),
    )
    row = pack([example])
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert row.segments == (Segment(0, 6, 0, 0), Segment(6, 7, 0, 4))
    assert row.predictors.tolist() == [3, 4, 5, 3, 6]
    assert row.targets.tolist() == [5, 6, 7, 8, 9]
    assert row.response_of_token.tolist() == [0, 0, 0, 1, 1]


def test_only_the_first_responses_are_laid_out_when_asked() -> None:
    example = Example(prompt=np.array([1], np.int32), responses=(np.array([2, 3], np.int32), np.array([4], np.int32)))
    row = pack([example], first_responses=1)
    assert row.targets.tolist() == [2, 3]
    assert row.responses_per_example == (1,)


def test_sums_are_weighted_and_exact_where_float32_would_round() -> None:
    example = Example(
        prompt=np.array([1], np.int32),
        responses=(np.array([2, 3], np.int32), np.array([4], np.int32)),
        weights=(np.array([1.0, 0.5], np.float32), np.array([2.0], np.float32)),
    )
    row = pack([example])
    sums = sum_by_response(row, torch.tensor([1e8, 1.0, 3.0]))
    assert sums.tolist() == [1e8 + 0.5, 6.0]
    assert tokens_by_response(row).tolist() == [1.5, 2.0]


def test_unweighted_examples_count_fully_beside_weighted_ones() -> None:
    plain = Example(prompt=np.array([1], np.int32), responses=(np.array([2, 3], np.int32),))
    weighted = Example(
        prompt=np.array([1], np.int32),
        responses=(np.array([2], np.int32),),
        weights=(np.array([0.25], np.float32),),
    )
    assert tokens_by_response(pack([plain, weighted])).tolist() == pytest.approx([2.0, 0.25])
