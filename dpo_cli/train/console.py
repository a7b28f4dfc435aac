"""What a run says while it works: a progress line on a terminal, plain greppable lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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


def summary(metrics: Mapping[str, float], names: tuple[str, ...] = tuple(_SHOWN)) -> str:
    """The metrics worth a line, in one line."""
    parts = (
        (label, layout.format(metrics[name]))
        for name, (label, layout) in _SHOWN.items()
        if name in names and name in metrics
    )
    return "  ".join(f"{label} {value}" for label, value in parts)


class RunConsole:
    """The screen of one run; only the main rank has one."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        """A plain line, with no markup read into it."""
        self._console.print(Text(text))

    def heading(self, text: str) -> None:
        self._console.print(Text(text, style="bold"))

    def show(self, table: Table) -> None:
        self._console.print(table)

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """Show progress towards `total` until the end of the block; `advance` moves it."""
        if not self._console.is_terminal:
            self._plain = _PlainProgress(self, what, total, done)
            yield
            return
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            _Metrics(),
            console=self._console,
        ) as progress:
            self._progress = progress
            self._task = progress.add_task(what, total=total, completed=done, metrics="")
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

    def advance(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)
            if metrics is not None:
                self._progress.update(self._task, metrics=summary(metrics, _ON_THE_BAR))
        elif self._progress is None and not self._console.is_terminal:
            self._plain.advance(done)

    def metrics(self, step: int, total: int, split: str, metrics: Mapping[str, float]) -> None:
        """A line of metrics; training lines only where there is no progress bar to show them."""
        if split == "eval" or not self._console.is_terminal:
            self.say(f"{split:5} step {step}/{total}  {summary(metrics)}")


_ON_THE_BAR = ("loss", "rewards/margins", "rewards/accuracies", "perf/tokens_per_second")


class _Metrics(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("metrics", ""), style="cyan")


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
