"""How long prompts and responses are, and whether the better response tends to be the longer one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.inspection.measure import SplitFacts
from dpo_cli.losses.types import ExampleKind

SIDES: dict[ExampleKind, tuple[str, ...]] = {
    "pair": ("chosen", "rejected"),
    "ranked": ("best", "worst"),
    "unpaired": ("response",),
    "demonstration": ("response",),
}
_BARS = 10


@dataclass(frozen=True)
class Spread:
    mean: float
    median: float
    p90: float
    p99: float
    longest: int


@dataclass(frozen=True)
class Summary:
    """In tokens. histogram: of whole examples, (from, to exclusive, examples).

    longer_wins, equal_lengths: shares of examples whose better response is longer than, or as long as, the worse one;
    None where examples are no pairs.
    """

    spreads: dict[str, Spread]
    histogram: list[tuple[int, int, int]]
    longer_wins: float | None
    equal_lengths: float | None


def summary_of(facts: SplitFacts, kind: ExampleKind) -> Summary:
    sides = dict(zip(SIDES[kind], (facts.best, facts.worst), strict=False))
    two = len(sides) == 2
    parts: dict[str, NDArray[Any]] = {"prompt": facts.prompt, **sides, "example": facts.sizes}
    return Summary(
        spreads={name: _spread(tokens) for name, tokens in parts.items()},
        histogram=_histogram(facts.sizes),
        longer_wins=float((facts.best > facts.worst).mean()) if two else None,
        equal_lengths=float((facts.best == facts.worst).mean()) if two else None,
    )


def _spread(tokens: NDArray[Any]) -> Spread:
    median, p90, p99 = np.percentile(tokens, [50, 90, 99]).tolist()
    return Spread(float(tokens.mean()), median, p90, p99, int(tokens.max()))


def _histogram(tokens: NDArray[Any]) -> list[tuple[int, int, int]]:
    """At most so many bars, of a width that is 1, 2 or 5 times a power of ten."""
    rough = max(1.0, (int(tokens.max()) + 1) / _BARS)
    power = 10 ** math.floor(math.log10(rough))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    counts = np.bincount(tokens // width)
    return [(at * width, (at + 1) * width, count) for at, count in enumerate(counts.tolist())]
