"""How a CPU cuts the queries of a sequence: for its kernel of attention, and for the forecast of what that takes.

In sequences of less than 768 the kernel computes nearly all scores that `is_causal` or a mask hides, too. A block of
queries sees the keys up to its own end and never meets later ones.
"""

from __future__ import annotations

QUERIES = 96
# The kernel itself takes these in larger blocks, and passes over keys that come later.
UNCUT = 768


def is_cut(queries: int) -> bool:
    return queries < UNCUT


def cut_queries(queries: int) -> list[tuple[int, int]]:
    """[first, end) of every block; of one width, so that blocks of several sequences are alike."""
    width = QUERIES if is_cut(queries) else queries
    return [(first, min(first + width, queries)) for first in range(0, queries, width)]
