"""trackio: a database on this machine that `trackio show` draws"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_cli.config.schema import TrackioConfig
from dpo_cli.health.curves import Severity
from dpo_cli.health.monitor import Told
from dpo_cli.tracking.tracker import Ending, RunFacts, Tracker


class Trackio(Tracker):
    """One trackio run a run folder. trackio tells nobody what it holds: steps that a resume repeats are there twice."""

    def __init__(self, config: TrackioConfig) -> None:
        self._config = config
        self._run: Any = None

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        import trackio

        self._run = trackio.init(
            project=self._config.project,
            # Runs are found again by their name alone.
            name=f"{self._config.name or run.name}-{run.id}",
            group=run.group,
            config={**run.settings, "tags": [*run.tags, *self._config.tags]},
            resume="allow",
            embed=False,
        )
        # trackio itself says on the screen how to look at it.
        return None

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)

    def finding(self, told: Told) -> None:
        import trackio

        levels = {
            Severity.NOTE: trackio.AlertLevel.INFO,
            Severity.WARNING: trackio.AlertLevel.WARN,
            Severity.ALARM: trackio.AlertLevel.ERROR,
        }
        self._run.alert(title=told.name, text=told.as_text(), level=levels[told.finding.severity])

    def results(self, step: int, results: Mapping[str, float]) -> None:
        self.log(step, "final", results)

    def end(self, ending: Ending) -> None:
        self._run.finish()
