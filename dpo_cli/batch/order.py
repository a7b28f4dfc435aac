"""Which examples make up which optimiser step: a pure function of (seed, epoch, step)."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray


# Two epochs each of the data and of the generator's prompts.
@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, examples: int) -> NDArray[np.int64]:
    """The order of one epoch, (examples,) a permutation. Counter-based, so that no epoch depends on another."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(examples)


def steps_per_epoch(examples: int, global_pairs: int) -> int:
    """Optimiser steps in one pass over the data; the last one may be smaller, no example is left out."""
    return math.ceil(examples / global_pairs)


def global_batch(step: int, *, seed: int, examples: int, global_pairs: int) -> NDArray[np.int64]:
    """Indices of the examples that step `step` (counted from 0) trains on."""
    epoch, position = divmod(step, steps_per_epoch(examples, global_pairs))
    return epoch_order(seed, epoch, examples)[position * global_pairs : (position + 1) * global_pairs]


def cycled_batch(step: int, *, seed: int, examples: int, size: int) -> NDArray[np.int64]:
    """Indices of the `size` examples that step `step` takes from data that are gone through again and again."""
    places = np.arange(step * size, (step + 1) * size)
    return np.array([epoch_order(seed, place // examples, examples)[place % examples] for place in places.tolist()])


def examples_cycled(steps: int, *, seed: int, examples: int, size: int) -> NDArray[np.int64]:
    """Ascending indices of the examples that `cycled_batch` gives in so many steps."""
    if steps * size >= examples:
        return np.arange(examples)
    return np.sort(epoch_order(seed, 0, examples)[: steps * size])


def examples_shown(steps: int, *, seed: int, examples: int, global_pairs: int) -> NDArray[np.int64]:
    """Ascending indices of the examples that a run of so many steps trains on at least once."""
    if steps >= steps_per_epoch(examples, global_pairs):
        return np.arange(examples)
    return np.sort(epoch_order(seed, 0, examples)[: steps * global_pairs])
