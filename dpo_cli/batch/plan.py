"""Cutting a global batch into micro-batches that fit a token budget, balanced in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
