"""The jobs of a sweep, and what became of each: kept in the sweep's folder, so that a sweep can be gone on with"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dpo_cli.atomic import write_json
from dpo_cli.errors import EXIT_ENDED_EARLY, EXIT_NON_FINITE

_OUTCOMES_FILE = "outcomes.json"
# A run that health.stop_on has ended has not failed.
SUCCEEDED = (0, EXIT_ENDED_EARLY)
_STATES = {0: "finished", EXIT_ENDED_EARLY: "ended early", EXIT_NON_FINITE: "not finite"}


@dataclass(frozen=True)
class Job:
    """One run. words: its overrides, those that all jobs share included. values: key and value of those that differ."""

    number: int
    words: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


class Source(Protocol):
    """Where jobs come from: a grid has all of them from the start, a search makes each up from what came before."""

    @property
    def at_once(self) -> int:
        """How many may run side by side where nobody says."""

    def next(self, count: int) -> Sequence[Job]:
        """At most `count` jobs that are to be started, or gone on with; none left ends the sweep."""

    def tell(self, job: Job, code: int) -> None:
        """A job has ended with this exit code. Raises DpoError where that ends the sweep."""

    def started(self) -> Sequence[Job]:
        """All jobs that there are so far, by number."""


class Outcomes:
    """Exit codes of the jobs that have ended, by their numbers."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _OUTCOMES_FILE
        self.codes: dict[int, int] = {}
        if self._file.exists():
            self.codes = {int(number): code for number, code in json.loads(self._file.read_bytes()).items()}

    def record(self, job: Job, code: int) -> None:
        self.codes[job.number] = code
        write_json(self._file, {str(number): code for number, code in self.codes.items()})

    def succeeded(self, number: int) -> bool:
        return self.codes.get(number) in SUCCEEDED

    def state(self, number: int) -> str:
        code = self.codes.get(number)
        return "unfinished" if code is None else _STATES.get(code, f"failed with exit code {code}")


class Grid:
    """Every combination of the values given, the last key varying fastest."""

    def __init__(self, jobs: Sequence[Job], outcomes: Outcomes) -> None:
        self._jobs = jobs
        self._left = [job for job in jobs if not outcomes.succeeded(job.number)]
        self.at_once = max(1, len(jobs))

    def next(self, count: int) -> Sequence[Job]:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def tell(self, job: Job, code: int) -> None:
        """A grid goes on whatever comes of one of its jobs."""

    def started(self) -> Sequence[Job]:
        return self._jobs
