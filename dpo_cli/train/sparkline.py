"""A curve in one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCKS = "▁▂▃▄▅▆▇█"
# For terminals that know no others.
ASCII_BLOCKS = "_.-=+*#@"


def sparkline(values: Sequence[float], width: int, *, blocks: str = BLOCKS) -> str:
    """The values from left to right, the lowest as the first of `blocks` and the highest as the last.

    At most `width` characters: more values than that are averaged over equal stretches. What is not finite is a gap;
    values that are all the same lie in the middle.
    """
    shown = [_mean(values[start:stop]) for start, stop in _stretches(len(values), width)]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return " " * len(shown)
    # In units of the largest, so that no difference overflows.
    unit = max(map(abs, finite)) or 1.0
    low, high = min(finite) / unit, max(finite) / unit
    top = len(blocks) - 1

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return blocks[round(top * (value / unit - low) / (high - low)) if high > low else len(blocks) // 2]

    return "".join(map(block, shown))


def _stretches(count: int, width: int) -> list[tuple[int, int]]:
    width = min(width, count)
    return [(at * count // width, (at + 1) * count // width) for at in range(width)]


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


@dataclass
class Curve:
    """A metric from its first line to its last, in less than `most` points: of a long curve each stands for several."""

    most: int = 256
    points: list[float] = field(default_factory=list)
    _together: int = 1
    _pending: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self._pending.append(value)
        if len(self._pending) < self._together:
            return
        self.points.append(_mean(self._pending))
        self._pending = []
        if len(self.points) >= self.most:
            self.points = [_mean(self.points[at : at + 2]) for at in range(0, len(self.points), 2)]
            self._together *= 2
