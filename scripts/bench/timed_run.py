"""A training as `dpo-train` does it, with a clock beside it: `timed_run.py [--turns] OVERRIDE...` prints JSON.

starts, ends: of every step, in seconds since this process was asked for and in seconds of its processor time.
metrics: the run's lines of training metrics.
--turns: before the first step and after each one it says a line, and waits for one; see `bench_report.run_in_turns`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from bench_report import seconds_since_launch
from rich.console import Console

from dpo_cli.cli.run_folder import create_run_folder
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.train.console import RunConsole
from dpo_cli.train.metrics_log import read_metrics


class StepClock(RunConsole):
    """Notes when the progress of the training moves, which it does at the end of every step."""

    def __init__(self, *, turns: bool) -> None:
        super().__init__(Console(file=StringIO()))
        self.starts: list[tuple[float, float]] = []
        self.ends: list[tuple[float, float]] = []
        self._training, self._turns = False, turns

    @contextmanager
    def training(
        self, total: int, done: int = 0, history: Callable[[], Iterable[Mapping[str, Any]]] = tuple
    ) -> Iterator[None]:
        self._training = True
        with super().training(total, done, history):
            self._start()
            yield
        self._training = False

    def advance(self, done: int) -> None:
        super().advance(done)
        if self._training:
            self.ends.append(_now())
            self._start()

    def _start(self) -> None:
        if self._turns:
            print("ready", flush=True)
            sys.stdin.readline()
        self.starts.append(_now())


def _now() -> tuple[float, float]:
    return seconds_since_launch(), time.process_time()


def main() -> None:
    # As late as dpo-train does it: a configuration is checked before torch is imported.
    words = sys.argv[1:]
    turns = words[:1] == ["--turns"]
    request = Request(tuple(words[turns:]))
    config = check(compose(request))
    create_run_folder(config, request)
    from dpo_cli.train.run import run_training

    folder, clock = Path(config.run_dir), StepClock(turns=turns)
    run_training(config, run_dir=folder, console=clock)
    lines = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "train"]
    print(json.dumps({"starts": clock.starts[: len(clock.ends)], "ends": clock.ends, "metrics": lines}))


if __name__ == "__main__":
    main()
