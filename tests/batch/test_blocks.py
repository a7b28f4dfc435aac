"""Queries cut into blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dpo_cli.batch.blocks import QUERIES, UNCUT, cut_queries


@pytest.mark.parametrize("queries", [1, QUERIES, QUERIES + 1, UNCUT - 1, UNCUT, 100_000])
def test_blocks_cover_all_queries_once_and_are_as_wide_as_each_other(queries: int) -> None:
    blocks = cut_queries(queries)
    assert blocks[0][0] == 0 and blocks[-1][1] == queries
    assert all(before == after for (_, before), (after, _) in pairwise(blocks))
    widths = [end - first for first, end in blocks]
    assert set(widths[:-1]) <= {QUERIES} and 0 < widths[-1] <= max(widths)
    assert (len(blocks) == 1) == (queries <= QUERIES or queries >= UNCUT)
