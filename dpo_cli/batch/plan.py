"""Cutting a global batch into micro-batches that fit a token budget, balanced in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


def microbatches(sizes: Sequence[int], *, tokens_per_microbatch: int, ranks: int = 1) -> list[list[int]]:
    """Spread examples over as few micro-batches as hold them, none over budget unless one example alone is.

    sizes: packed tokens of each example of the global batch.
    Returns positions into `sizes`, every one exactly once, in a multiple of `ranks` micro-batches of which rank r
    takes every `ranks`-th from r on; an empty one has nothing for its rank to do. Heaviest first, so those that are
    computed at the same time are nearly equal, and memory runs out in the first one or never.
    Longest first into the emptiest micro-batch (LPT), so the micro-batches differ little in tokens; ties go to the
    earlier, so the plan depends on nothing but its arguments.
    """
    if not sizes:
        return []
    longest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    count = ranks * math.ceil(sum(sizes) / tokens_per_microbatch / ranks)
    while True:
        loads = [0] * count
        members: list[list[int]] = [[] for _ in range(count)]
        for index in longest_first:
            emptiest = min(range(count), key=lambda bin_: (loads[bin_], bin_))
            loads[emptiest] += sizes[index]
            members[emptiest].append(index)
        fits = all(load <= tokens_per_microbatch or len(group) == 1 for load, group in zip(loads, members, strict=True))
        if fits:
            heaviest_first = sorted(range(count), key=lambda bin_: -loads[bin_])
            rounds = math.ceil(sum(bool(group) for group in members) / ranks)
            return [sorted(members[bin_]) for bin_ in heaviest_first[: rounds * ranks]]
        count += ranks


class Share(NamedTuple):
    """Places of the examples that one rank computes together.

    idle: it has nothing to do, and takes part because every rank must do equally many passes; it counts for nothing.
    """

    places: list[int]
    idle: bool


def shares(sizes: Sequence[int], *, tokens_per_microbatch: int, rank: int, ranks: int) -> list[Share]:
    """Rank `rank`'s part of `microbatches`, as long as every other's; an idle share holds the smallest example."""
    plan = microbatches(sizes, tokens_per_microbatch=tokens_per_microbatch, ranks=ranks)
    smallest = min(range(len(sizes)), key=sizes.__getitem__, default=0)
    return [Share(places or [smallest], idle=not places) for places in plan[rank::ranks]]
