"""The live view of a training: a few calm lines, and the block that stays when it is over.

It knows only what it is told. Lines have no frame and no padding, so that a terminal made narrower has little to wrap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dpo_cli.durations import as_clock
from dpo_cli.health.curves import Severity
from dpo_cli.health.monitor import Told
from dpo_cli.train.sparkline import ASCII_BLOCKS, BLOCKS, Curve, sparkline

# Those with a curve, in this order when they are there.
_CURVES = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:+.3f}"),
    "rewards/accuracies": ("accuracy", "{:.1%}"),
}
_SPEED = {
    "perf/tokens_per_second": "{:,.0f} tokens/s",
    "perf/sampling_pct": "{:.0f}% of the time sampling",
    "perf/mfu_pct": "MFU {:.1f}%",
    "perf/memory_gib": "memory {:.1f} GiB",
}
_GENERATOR = {
    "generator/eos_rate": "{:.0%} ended",
    "generator/length": "{:.0f} tokens each",
    "generator/active_fraction": "{:.0%} below their truth",
    "generator/kl": "KL {:.3g}",
    "loss/generator": "loss {:.3g}",
}
_SEVERITY_STYLE = {Severity.NOTE: "cyan", Severity.WARNING: "yellow", Severity.ALARM: "bold red"}
_LABEL, _VALUE, _BAR, _MOST_SPARK = 11, 9, 28, 40
# The narrowest terminal that also shows what was held out beside each curve.
_ROOM_FOR_HELD_OUT = 76


@dataclass
class Panel:
    """total, done: optimiser steps. doing: what the run is at. facts: lines by their labels. notice: shown on top."""

    total: int
    done: int
    doing: str = "training"
    facts: dict[str, str] = field(default_factory=dict)
    notice: str | None = None
    began: float = field(default_factory=time.monotonic)
    # How many columns each line took when they were last drawn.
    drawn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.start_clock()
        self._latest: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._first: dict[str, dict[str, float]] = {"train": {}, "eval": {}}
        self._curves = {name: Curve() for name in _CURVES}
        self._found: Told | None = None

    def start_clock(self) -> None:
        """From here on the pace is measured that the remaining time follows from."""
        self._pace_from = self.done, time.monotonic()

    @property
    def has_moved(self) -> bool:
        """Whether there has been a step since the clock was started."""
        return self.done > self._pace_from[0]

    def take(self, split: str, metrics: Mapping[str, float | None]) -> None:
        """One line of metrics."""
        numbers = {name: math.nan if value is None else value for name, value in metrics.items()}
        self._latest[split] = numbers
        self._first[split] = numbers | self._first[split]
        if split == "train":
            for name, curve in self._curves.items():
                if name in numbers:
                    curve.add(numbers[name])

    def find(self, told: Told) -> None:
        """What was last said of the run's health."""
        self._found = told

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The last column stays free: some terminals wrap as soon as it is written.
        width = options.max_width - 1
        # Of a very low terminal the first lines: a view that scrolls would leave copies of itself behind.
        rows = list(self._rows(width, ascii_only=options.ascii_only))[: max(1, console.height - 1)]
        for row in rows:
            row.truncate(width, overflow="ellipsis")
        self.drawn = tuple(row.cell_len for row in rows)
        yield from rows

    def _rows(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        yield Text()
        yield self._progress(width, ascii_only=ascii_only)
        for name, curve in self._curves.items():
            if name in self._latest["train"]:
                yield self._curve(name, curve, width, ascii_only=ascii_only)
        speed = _listed(_SPEED, self._latest["train"])
        if speed:
            yield _row("speed", Text(speed))
        for label, fact in list(self.facts.items()):
            yield _row(label, Text(fact))
        generator = _listed(_GENERATOR, self._latest["train"])
        if generator:
            yield _row("generator", Text(generator))
        if self._found is not None:
            yield _row("health", self._health(self._found))
        if self.notice is not None:
            yield Text(self.notice, style="yellow")

    def _progress(self, width: int, *, ascii_only: bool) -> Text:
        share = self.done / max(1, self.total)
        told = f"{self.done:,}/{self.total:,}  {share:4.0%}  {self._time_left()}"
        bar = max(4, min(_BAR, width - _LABEL - len(told) - 2))
        full = round(bar * share)
        line, rest = ("=", "-") if ascii_only else ("━", "━")
        row = Text().append(f"{self.doing:<{_LABEL}}", style="bold")
        row.append(line * full, style="green").append(rest * (bar - full), style="bright_black")
        return row.append(f"  {told}")

    def _time_left(self) -> str:
        if self.done >= self.total:
            return f"in {as_clock(time.monotonic() - self.began)}"
        if not self.has_moved:
            return "..."
        step, began = self._pace_from
        # Evaluation and saving in between count as well, as they will again.
        return f"{as_clock((time.monotonic() - began) / (self.done - step) * (self.total - self.done))} left"

    def _curve(self, name: str, curve: Curve, width: int, *, ascii_only: bool) -> Text:
        label, layout = _CURVES[name]
        row = Text().append(f"{layout.format(self._latest['train'][name]):>{_VALUE}}", style="bold")
        if width >= _ROOM_FOR_HELD_OUT and name in self._latest["eval"]:
            row.append(f"   held out {layout.format(self._latest['eval'][name]):>{_VALUE}}", style="dim")
        room = max(4, min(_MOST_SPARK, width - _LABEL - len(row) - 3))
        spark = sparkline(curve.points, room, blocks=ASCII_BLOCKS if ascii_only else BLOCKS)
        return _row(label, row.append(f"   {spark}", style="cyan"))

    @staticmethod
    def _health(told: Told) -> Text:
        severity = told.finding.severity
        row = Text().append(severity.name.lower(), style=_SEVERITY_STYLE[severity])
        return row.append(f" at step {told.step}: {told.name}, {told.finding.what}")

    def summary(self, width: int, *, ascii_only: bool) -> Iterator[Text]:
        """The lines that stay on the screen: how far, how fast, and each curve from its first value to its last."""
        whole = self.done == self.total
        label, style = ("trained", "bold") if whole else ("stopped", "bold yellow")
        steps = f"{self.done:,} steps" if whole else f"after {self.done:,} of {self.total:,} steps"
        row = Text().append(f"{label:<{_LABEL}}", style=style)
        row.append(f"{steps} in {as_clock(time.monotonic() - self.began)}")
        if speed := _listed(_SPEED, self._latest["train"]):
            row.append(f"   {speed}", style="dim")
        yield row
        for name, (label, layout) in _CURVES.items():
            if name not in self._latest["train"]:
                continue
            row = _row(label, Text(self._change("train", name, layout, ascii_only=ascii_only)))
            if width >= _ROOM_FOR_HELD_OUT and name in self._latest["eval"]:
                row.append(f"  held out {self._change('eval', name, layout, ascii_only=ascii_only)}", style="dim")
            spark = sparkline(self._curves[name].points, 20, blocks=ASCII_BLOCKS if ascii_only else BLOCKS)
            row.append(f"  {spark}" if len(row) + 22 < width else "", style="cyan")
            yield row

    def _change(self, split: str, name: str, layout: str, *, ascii_only: bool) -> str:
        first, last = (layout.format(each[split][name]) for each in (self._first, self._latest))
        return f"{first:>{_VALUE}} {'->' if ascii_only else '→'} {last:<{_VALUE}}"


def _row(label: str, content: Text) -> Text:
    return Text().append(f"{label:<{_LABEL}}", style="dim").append_text(content)


def _listed(layouts: Mapping[str, str], metrics: Mapping[str, float]) -> str:
    return "   ".join(layout.format(metrics[name]) for name, layout in layouts.items() if name in metrics)
