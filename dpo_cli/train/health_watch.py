"""Findings of a run while it trains: on the screen, in health.jsonl, and where `health.stop_on` names one, its end.

Only lines that metrics.jsonl already holds are judged, by the main rank alone; its wish to end the run travels with the
next step's exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.config.schema import Config
from dpo_cli.health.curves import Setup, Severity
from dpo_cli.health.monitor import Monitor, Told
from dpo_cli.train.metrics_log import MetricsLog, read_metrics

HEALTH = "health.jsonl"


@dataclass
class HealthWatch:
    """stop_on: names of findings. tell: shows one on the screen.

    ends: the one of them that ends the run, once it was told as more than a note.
    """

    monitor: Monitor
    stop_on: Collection[str]
    log: MetricsLog
    tell: Callable[[Told], None]
    ends: Told | None = None

    @classmethod
    def of(cls, config: Config, run_dir: Path, tell: Callable[[Told], None], alive: ExitStack) -> HealthWatch | None:
        """None where nothing is to be told. alive: keeps health.jsonl open until training is over."""
        if not config.health.enabled:
            return None
        log = alive.enter_context(MetricsLog(run_dir / HEALTH))
        return cls(Monitor(Setup.of(config.as_dict())), config.health.stop_on, log, tell)

    def repeat(self, metrics: Path) -> None:
        """Go through the lines that a resumed run begins with: what was told of them is recorded anew, and not said."""
        self.log.truncate_after(-1)
        for row in read_metrics(metrics) if metrics.exists() else ():
            self._record(row)

    def after(self, row: Mapping[str, Any]) -> list[Told]:
        """Judge the run by one more line of its metrics; returns what was told of it."""
        found = self._record(row)
        for told in found:
            self.tell(told)
        return found

    def _record(self, row: Mapping[str, Any]) -> list[Told]:
        found = self.monitor.after(row)
        for told in found:
            self.log.append_row(told.as_row())
            if self.ends is None and told.name in self.stop_on and told.finding.severity > Severity.NOTE:
                self.ends = told
        return found
