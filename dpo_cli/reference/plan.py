"""Which responses are scored together: a pure function of what is missing.

The last bits of a log-prob depend on what was computed beside it, so a scoring pass that was killed and goes on must
compose exactly the batches of an uninterrupted one. It does, because batches are cut GREEDILY in ASCENDING order of
size and enter the store whole: a batch ends where the next unit did not fit, every later unit is at least as large, so
whatever whole batches are missing behind it, it ends at the same place. The same argument holds one level below, where
the responses of one prompt are cut into units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_cli.reference.keys import KeyArray, key_bytes


@dataclass(frozen=True)
class Unit:
    """One prompt with missing responses to it, laid out once.

    size: packed tokens, the prompt's and the responses'.
    key: breaks ties between units of equal size; the key of its first response, so no two units share it.
    members: positions of its responses in the arrays the plan was made from.
    """

    size: int
    key: bytes
    members: tuple[int, ...]


def scoring_units(
    prompts: KeyArray,
    prompt_sizes: NDArray[np.int32],
    keys: KeyArray,
    response_sizes: NDArray[np.int32],
    *,
    tokens_per_batch: int,
) -> list[Unit]:
    """Gather missing responses by prompt, so that a prompt shared by many pairs is computed once.

    prompts, keys: (missing,) prompt and response keys; `keys` are unique. Sizes in tokens, each (missing,).
    A prompt whose responses exceed the budget becomes several units; a single response may exceed it alone.
    The order of the arrays does not matter.
    """
    order = np.lexsort((keys, response_sizes, prompts))
    ends = np.flatnonzero(prompts[order][1:] != prompts[order][:-1]) + 1
    names = key_bytes(keys)
    units = []
    for group in np.split(order, ends):
        if not len(group):
            continue
        prompt_size = int(prompt_sizes[group[0]])
        sizes = response_sizes[group].tolist()
        for start, end in _cut(sizes, budget=tokens_per_batch - prompt_size):
            members = tuple(group[start:end].tolist())
            units.append(Unit(prompt_size + sum(sizes[start:end]), names[members[0]], members))
    return units


def scoring_batches(sizes: Sequence[int], keys: Sequence[bytes], *, tokens_per_batch: int) -> list[list[int]]:
    """Cut units into batches of at most `tokens_per_batch` packed tokens (more only where one unit alone is larger).

    sizes, keys: of each unit; keys are unique. Returns positions into them, every one exactly once, small units first.
    Leaving out all units of any whole batches leaves the other batches exactly as they were.
    """
    order = sorted(range(len(sizes)), key=lambda unit: (sizes[unit], keys[unit]))
    ascending = [int(sizes[unit]) for unit in order]
    return [order[start:end] for start, end in _cut(ascending, budget=tokens_per_batch)]


def _cut(ascending: Sequence[int], *, budget: int) -> list[tuple[int, int]]:
    """[start, end) of consecutive groups, each filled until the next size does not fit."""
    groups = []
    start, load = 0, 0
    for position, size in enumerate(ascending):
        if position > start and load + size > budget:
            groups.append((start, position))
            start, load = position, 0
        load += size
    if len(ascending):
        groups.append((start, len(ascending)))
    return groups
