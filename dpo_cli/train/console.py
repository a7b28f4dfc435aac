"""What a run says while it works: a live view on a terminal, plain greppable lines elsewhere, all of it in log.txt."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

from rich.console import Console, ConsoleDimensions, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from dpo_cli.engine.screen import OURS, level_of, screen_is_ours, tell_at_once
from dpo_cli.health.curves import Severity
from dpo_cli.health.monitor import Told
from dpo_cli.train.panel import Panel

# Shown in this order when a metric is there; the rest is in metrics.jsonl.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "rewards/margins": ("margin", "{:+.3f}"),
    "rewards/accuracies": ("accuracy", "{:.1%}"),
    "logps/chosen": ("logp chosen", "{:.1f}"),
    "logps/rejected": ("logp rejected", "{:.1f}"),
    "grad_norm": ("grad norm", "{:.3g}"),
    "learning_rate": ("lr", "{:.2e}"),
    "perf/tokens_per_second": ("tok/s", "{:,.0f}"),
}
# A frame costs a millisecond or two of the host's time.
_FRAMES_PER_SECOND = 2


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics worth a line, in one line."""
    parts = ((label, layout.format(metrics[name])) for name, (label, layout) in _SHOWN.items() if name in metrics)
    return "  ".join(f"{label} {value}" for label, value in parts)


class RunConsole:
    """The screen of one run; only the main rank has one.

    level: the least important of its own words that it shows, as log_level names it.
    """

    def __init__(self, console: Console | None = None, *, level: str = "info") -> None:
        self._console = console or _Screen(highlight=False, soft_wrap=True)
        self._level = level_of(level)
        self._facts: dict[str, str] = {}
        self._panel: Panel | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def is_live(self) -> bool:
        """Whether views that are drawn over themselves have a place here."""
        return self._console.is_terminal and not self._console.is_dumb_terminal and not os.environ.get("CI")

    def say(self, text: str) -> None:
        """A plain line, with no markup read into it. One that begins with "note:" counts as a warning."""
        self._tell(text, logging.WARNING if text.startswith("note:") else logging.INFO)

    def explain(self, text: str) -> None:
        """A line for log_level=debug."""
        self._tell(text, logging.DEBUG)

    def heading(self, text: str) -> None:
        self._tell(text, logging.INFO, style="bold")

    def _tell(self, text: str, level: int, style: str = "") -> None:
        OURS.log(level, text)
        if level >= self._level:
            self._console.print(Text(text, style=style))

    def show(self, table: Table) -> None:
        self._console.print(table)

    def remember(self, label: str, fact: str) -> None:
        """Something that the live view of the training shows all the time."""
        self._facts[label] = fact

    def find(self, told: Told) -> None:
        """A finding on the run's health."""
        self._tell(told.as_text(), logging.INFO if told.finding.severity == Severity.NOTE else logging.WARNING)
        if self._panel is not None:
            self._panel.find(told)

    def interject(self, text: str) -> None:
        """Called by a signal's handler, in the middle of anything: nothing is waited for."""
        if self._panel is not None:
            self._panel.notice = text
        else:
            tell_at_once(f"\n{text}\n")

    @contextmanager
    def training(
        self, total: int, done: int = 0, history: Callable[[], Iterable[Mapping[str, Any]]] = tuple
    ) -> Iterator[None]:
        """The live view of `total` optimiser steps until the end of the block; `advance` and `metrics` move it.

        history: the lines of metrics that a resumed run begins with.
        """
        if not self.is_live:
            with self.progress("training", total, done):
                yield
            return
        self._panel = panel = Panel(total, done, facts=self._facts)
        for row in history():
            panel.take(row["split"], {name: value for name, value in row.items() if name not in ("step", "split")})
        try:
            with _View(panel, self._console):
                yield
        finally:
            self._panel = None
            if panel.done > done:
                for line in panel.summary(self._console.width, ascii_only=self._console.options.ascii_only):
                    self._console.print(line)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """What the training is at while its steps stand still."""
        panel = self._panel
        if panel is None:
            yield
            return
        before, panel.doing = panel.doing, what
        try:
            yield
        finally:
            panel.doing = before
            if not panel.has_moved:
                panel.start_clock()

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """Show progress towards `total` until the end of the block; `advance` moves it."""
        if not self.is_live:
            self._plain = _PlainProgress(self, what, total, done)
            yield
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            refresh_per_second=_FRAMES_PER_SECOND,
            redirect_stderr=not screen_is_ours(),
        ) as progress:
            self._progress = progress
            self._task = progress.add_task(what, total=total, completed=done)
            try:
                yield
            finally:
                self._progress = None

    @contextmanager
    def progress_once_begun(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """What is to be called with (done, total); its first call opens `progress`: without one, nothing is shown."""
        with ExitStack() as display:
            opened = False

            def show(done: int, total: int) -> None:
                nonlocal opened
                if not opened:
                    display.enter_context(self.progress(what, total))
                    opened = True
                self.advance(done)

            yield show

    def advance(self, done: int) -> None:
        if self._panel is not None:
            self._panel.done = done
        elif self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
        elif not self.is_live:
            self._plain.advance(done)

    def metrics(self, step: int, total: int, split: str, metrics: Mapping[str, float]) -> None:
        """A line of metrics; on a terminal, which shows those of training in its live view, of evaluations alone."""
        if self._panel is not None:
            self._panel.take(split, metrics)
        line = f"{split:5} step {step}/{total}  {summary(metrics)}"
        if split == "eval" or self._panel is None or self._level <= logging.DEBUG:
            self.say(line)
        else:
            OURS.info(line)


class _View(Live):
    """A panel that is drawn over itself, and gone at the end."""

    def __init__(self, panel: Panel, console: Console) -> None:
        super().__init__(
            panel,
            console=console,
            refresh_per_second=_FRAMES_PER_SECOND,
            transient=True,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._shown = panel

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Begin where the panel begins; a terminal made narrower has wrapped its lines, which rich overlooks."""
        width = self.console.width
        wrapped = sum(max(0, columns - 1) // width for columns in self._shown.drawn)
        up = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * wrapped)
        return [up, *super().process_renderables(renderables)]


class _Screen(Console):
    """A console on standard output that asks its own terminal for its size, and hands each frame over in one piece."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(file=cast(IO[str], _InOnePiece(sys.stdout)), **settings)

    @property
    def size(self) -> ConsoleDimensions:
        # rich asks descriptors 0, 1 and 2, of which a run has given two to its log.
        if "COLUMNS" not in os.environ:
            try:
                return ConsoleDimensions(*os.get_terminal_size(self.file.fileno()))
            except (AttributeError, OSError, ValueError):
                pass
        return super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self.width, self.height = new_size

    def on_broken_pipe(self) -> None:
        """Whoever read along has left: the run goes on, and log.txt has what it says. rich would end the process."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


class _InOnePiece:
    """A terminal that is asked to draw what one call writes all at once, so that no half-drawn frame is ever seen.

    Source: "Synchronized Output", private mode 2026; terminals that do not know it ignore it.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._drawn_over = stream.isatty()

    def write(self, text: str) -> int:
        return self._stream.write(f"\x1b[?2026h{text}\x1b[?2026l" if self._drawn_over and "\x1b[" in text else text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _PlainProgress:
    """A line now and then for a log file: when begun and after every tenth, but not more often than every 5 s."""

    def __init__(self, console: RunConsole, what: str, total: int, done: int) -> None:
        self._console, self._what, self._total = console, what, total
        self._tenth = 10 * done // max(1, total)
        self._last = time.monotonic()

    def advance(self, done: int) -> None:
        tenth = 10 * done // max(1, self._total)
        now = time.monotonic()
        if tenth > self._tenth and now - self._last >= 5:
            self._tenth, self._last = tenth, now
            self._console.say(f"{self._what}: {done:,}/{self._total:,}")
