"""Queries cut into blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dpo_cli.batch.blocks import MOST_BLOCKS, QUERIES, cut_queries

WHOLE = MOST_BLOCKS * QUERIES


@pytest.mark.parametrize("queries", [1, QUERIES, QUERIES + 1, WHOLE, WHOLE + 1, 100_000])
def test_blocks_cover_all_queries_once_and_are_few_and_as_wide_as_each_other(queries: int) -> None:
    blocks = cut_queries(queries)
    assert blocks[0][0] == 0 and blocks[-1][1] == queries and len(blocks) <= MOST_BLOCKS
    assert all(before == after for (_, before), (after, _) in pairwise(blocks))
    widths = [end - first for first, end in blocks]
    assert len(set(widths[:-1])) <= 1 and 0 < widths[-1] <= widths[0]
    assert len(widths) == 1 or (widths[0] // QUERIES).bit_count() == 1, "few widths"
