"""How a CPU cuts the queries of a sequence: for its kernel of attention, and for the forecast of what that takes.

The kernel computes scores that `is_causal` or a mask hides, too. A block of queries sees the keys up to its own end and
never meets later ones. Every block gathers its keys, so long sequences have few wide blocks.
"""

from __future__ import annotations

QUERIES = 96
MOST_BLOCKS = 8


def cut_queries(queries: int) -> list[tuple[int, int]]:
    """[first, end) of every block. Few widths, so that blocks of several sequences are alike."""
    width = QUERIES
    while queries > MOST_BLOCKS * width:
        width *= 2
    return [(first, min(first + width, queries)) for first in range(0, queries, width)]
