"""Near-duplicates among token sequences: MinHash over windows of tokens finds candidates, exact overlap confirms them.

Time is linear in tokens, memory 64 bytes a document. A document is a tuple of parts (a prompt, its responses), and two
are alike when every part of one is like the same part of the other, so that a long prompt shared by many rows makes
none of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Parts = Sequence[Ids]
Hashes = NDArray[np.uint64]

# Five tokens are about four words: enough that two unrelated texts share few windows.
_WINDOW = 5
# Of two documents with overlap J the candidates are found with probability 1 - (1 - J ** 4) ** 8: 0.985 at J = 0.8.
_BANDS, _MINIMA_A_BAND = 8, 4
_random = np.random.Generator(np.random.Philox(key=[0, 0]))
_POWERS = _random.integers(1 << 63, size=_WINDOW, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_MASKS = _random.integers(1 << 63, size=_BANDS * _MINIMA_A_BAND, dtype=np.uint64)
_FACTORS = _random.integers(1 << 63, size=_BANDS * _MINIMA_A_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def near_duplicates(
    documents: int, parts_of: Callable[[int], Parts], *, threshold: float, first_asked: int = 1
) -> NDArray[np.int64]:
    """(documents,) an earlier document that each is like, -1 where none was found.

    threshold: least Jaccard overlap of windows, in (0, 1]. first_asked: documents before this one are not asked about.
    A candidate is compared with the first of those that share a band with it, not with all: what is counted is true,
    and may miss a few.
    """
    found = np.full(documents, -1, dtype=np.int64)
    if documents < 2:
        return found
    bands = np.empty((documents, _BANDS), dtype=np.uint64)
    for at in range(documents):
        bands[at] = _bands(parts_of(at))
    for band in range(_BANDS):
        keys = bands[:, band]
        order = np.argsort(keys, kind="stable")
        same = np.zeros(documents, dtype=bool)
        same[1:] = keys[order[1:]] == keys[order[:-1]]
        firsts = order[np.maximum.accumulate(np.where(same, 0, np.arange(documents)))]
        asked = same & (order >= first_asked) & (found[order] < 0)
        for first, member in zip(firsts[asked].tolist(), order[asked].tolist(), strict=True):
            if overlap(parts_of(first), parts_of(member)) >= threshold:
                found[member] = first
    return found


def overlap(first: Parts, second: Parts) -> float:
    """The smallest Jaccard overlap of windows of any part; 0 for different numbers of parts."""
    if len(first) != len(second):
        return 0.0
    return min(_jaccard(_windows(one), _windows(other)) for one, other in zip(first, second, strict=True))


def _jaccard(first: Hashes, second: Hashes) -> float:
    one, other = np.unique(first), np.unique(second)
    shared = len(np.intersect1d(one, other, assume_unique=True))
    either = len(one) + len(other) - shared
    return shared / either if either else 1.0


def _windows(ids: Ids) -> Hashes:
    """(tokens,) a hash of every window; those that reach over the end make a short text comparable, too."""
    padded = np.zeros(len(ids) + _WINDOW - 1, dtype=np.uint64)
    padded[: len(ids)] = ids.astype(np.uint64) + np.uint64(1)
    hashed = np.zeros(len(ids), dtype=np.uint64)
    for at in range(_WINDOW):
        hashed += padded[at : at + len(ids)] * _POWERS[at]
    return _mixed(hashed)


def _mixed(values: Hashes) -> Hashes:
    """Every bit of a value spread over all of them (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _bands(parts: Parts) -> Hashes:
    # The place of a part is mixed in: a text as a prompt is not the same text as a response.
    tagged = [_mixed(_windows(ids) + np.uint64(at)) for at, ids in enumerate(parts)]
    windows = np.concatenate(tagged)
    if not len(windows):
        return np.zeros(_BANDS, dtype=np.uint64)
    minima = ((windows[:, None] ^ _MASKS) * _FACTORS).min(axis=0).reshape(_BANDS, _MINIMA_A_BAND)
    bands: Hashes = (minima * _POWERS[:_MINIMA_A_BAND]).sum(axis=1, dtype=np.uint64)
    return bands


# With fewer, what all of them happen to share may be their own words.
_ENOUGH_FOR_A_FRAME = 100


def without_frame(documents: int, prompt_of: Callable[[int], Ids]) -> Callable[[int], Ids]:
    """Prompts without what all of them begin and end with: a template's words would make short questions alike."""
    if documents < _ENOUGH_FOR_A_FRAME:
        return prompt_of
    first = prompt_of(0)
    begin = end = len(first)
    for at in range(1, documents):
        ids = prompt_of(at)
        begin = _agreeing(first[:begin], ids)
        end = _agreeing(first[len(first) - end :][::-1], ids[::-1])

    def framed(at: int) -> Ids:
        ids = prompt_of(at)
        return ids[begin : max(begin, len(ids) - end)]

    return framed


def _agreeing(frame: Ids, ids: Ids) -> int:
    """How many tokens of `frame` `ids` begins with."""
    length = min(len(frame), len(ids))
    different = np.flatnonzero(frame[:length] != ids[:length])
    return int(different[0]) if len(different) else length
