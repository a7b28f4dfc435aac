"""Near-duplicates are found, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_cli.inspection.similar import near_duplicates, overlap, without_frame


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


@pytest.fixture(scope="module")
def texts() -> list[tuple[Any, ...]]:
    """A thousand documents of three parts, then the first three hundred again, a token of each part changed."""
    rng = np.random.default_rng(0)
    made = [tuple(rng.integers(0, 30000, size).astype(np.int32) for size in (60, 150, 100)) for _ in range(1000)]
    for document in made[:300]:
        changed = tuple(part.copy() for part in document)
        for part in changed:
            part[rng.integers(len(part))] = 30001
        made.append(changed)
    return made


def test_every_planted_near_duplicate_is_found_and_no_other(texts: list[tuple[Any, ...]]) -> None:
    found = near_duplicates(len(texts), texts.__getitem__, threshold=0.8)
    assert (found[:1000] == -1).all()
    assert (found[1000:] == np.arange(300)).mean() > 0.98
    assert set(found[1000:]) <= {-1, *range(300)}
    assert (near_duplicates(len(texts), texts.__getitem__, threshold=1.0) == -1).all()


def test_what_is_not_asked_about_is_not_told(texts: list[tuple[Any, ...]]) -> None:
    found = near_duplicates(len(texts), texts.__getitem__, threshold=0.8, first_asked=1200)
    assert (found[:1200] == -1).all()
    assert (found[1200:] >= 0).mean() > 0.98


def test_documents_are_as_alike_as_their_least_alike_part() -> None:
    first, second = ids(*range(100)), ids(*range(100, 200))
    assert overlap((first, second), (first, second)) == 1
    assert overlap((first, second), (first, first)) == 0
    assert overlap((first, second), (second, first)) == 0
    assert overlap((first,), (first, first)) == 0
    # A changed token takes part in five of the hundred windows of each.
    assert overlap((first,), (ids(*range(50), 7777, *range(51, 100)),)) == 95 / 105


def test_texts_shorter_than_a_window_are_compared_whole() -> None:
    assert overlap((ids(1, 2),), (ids(1, 2),)) == 1
    assert overlap((ids(1, 2),), (ids(1, 2, 3),)) == 0


def test_what_all_prompts_begin_and_end_with_is_left_out_of_many_and_of_few_is_not() -> None:
    prompts = [ids(1, 2, 3, 100 + at, 200 + at, 8, 9) for at in range(100)]
    framed = without_frame(100, prompts.__getitem__)
    assert framed(5).tolist() == [105, 205]
    assert without_frame(99, prompts.__getitem__)(5).tolist() == prompts[5].tolist()
    same = [ids(1, 2, 3)] * 100
    assert without_frame(100, same.__getitem__)(5).tolist() == []
