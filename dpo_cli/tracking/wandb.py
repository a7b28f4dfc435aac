"""Weights & Biases, online or offline; its files lie in the run folder"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_cli.config.schema import WandbConfig
from dpo_cli.health.curves import Severity
from dpo_cli.health.monitor import Told
from dpo_cli.tracking.tracker import Ending, RunFacts, Seen, Tracker

# W&B gives up before a run stops waiting for it, so that its own reason is told.
_PATIENCE_SECONDS = 45.0
# Metrics are drawn over this one: W&B's own step never goes back, and an evaluation may belong to a step before it.
_STEP = "step"


class Wandb(Tracker):
    """One W&B run a run folder. What a resumed run repeats is not sent again; see `Seen`.

    Offline, W&B does not know what an earlier part of the run holds: each resume leaves a part of its own, and
    `wandb sync` joins them, repeated steps twice.
    """

    def __init__(self, config: WandbConfig) -> None:
        self._config = config
        self._run: Any = None
        self._seen = Seen({})

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        import wandb

        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            id=run.id,
            name=self._config.name or run.name,
            group=run.group,
            tags=[*run.tags, *self._config.tags],
            config=dict(run.settings),
            dir=str(run.folder),
            mode=self._config.mode,
            resume="allow",
            # Of several runs in one process, as in a sweep, none ends another.
            reinit="create_new",
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=_PATIENCE_SECONDS, finish_timeout=_PATIENCE_SECONDS
            ),
        )
        self._run.define_metric("*", step_metric=_STEP)
        summary = self._run.summary
        last = {split: summary.get(f"{split}/epoch") for split in ("train", "eval")}
        self._seen = Seen({split: float(epoch) for split, epoch in last.items() if epoch is not None})
        if self._config.mode == "offline":
            return f"offline; send it with: wandb sync {run.folder / 'wandb'}/offline-run-*"
        return self._run.url

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if not self._seen.has(split, metrics):
            self._run.log({_STEP: step, **{f"{split}/{name}": value for name, value in metrics.items()}})

    def finding(self, told: Told) -> None:
        if self._config.alerts and told.finding.severity > Severity.NOTE:
            level = "ERROR" if told.finding.severity == Severity.ALARM else "WARN"
            self._run.alert(title=told.name, text=told.as_text(), level=level)

    def results(self, step: int, results: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in results.items()})

    def end(self, ending: Ending) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)
