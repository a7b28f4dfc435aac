"""MLflow: a tracking server, or a database in the run folder"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from dpo_cli.config.check import flatten
from dpo_cli.config.schema import MlflowConfig
from dpo_cli.health.monitor import Told
from dpo_cli.tracking.tracker import Ending, RunFacts, Seen, Tracker

_FILE = "mlflow.db"
_ID_TAG = "dpo_cli.id"
# What a server takes at once, and of one value.
_PARAMETERS = 100
_CHARACTERS = 6000
_STATUS: Mapping[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Mlflow(Tracker):
    """One MLflow run a run folder, found again by its tag. MLflow deletes no point: see `Seen`."""

    def __init__(self, config: MlflowConfig) -> None:
        self._config = config
        self._client: Any = None
        self._run_id = ""
        self._seen = Seen({})

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        from mlflow import MlflowClient

        uri = self._config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder / _FILE}"
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(self._config.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._config.experiment)
        found = self._client.search_runs([number], f"tags.`{_ID_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            self._seen = Seen({split: self._last_epoch(split) for split in ("train", "eval")})
        else:
            self._create_run(number, run)
        return f"run {self._run_id} of experiment {self._config.experiment}"

    def _create_run(self, experiment: str, run: RunFacts) -> None:
        from mlflow.entities import Param

        # A tag without a value: MLflow has no other kind of label.
        tags = {_ID_TAG: run.id, **dict.fromkeys((*run.tags, *self._config.tags), "")}
        if run.group:
            tags["sweep"] = run.group
        name = self._config.name or run.name
        self._run_id = self._client.create_run(experiment, run_name=name, tags=tags).info.run_id
        parameters = [Param(key, str(value)[:_CHARACTERS]) for key, value in flatten(run.settings)]
        for start in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._run_id, params=parameters[start : start + _PARAMETERS])

    def _last_epoch(self, split: str) -> float:
        history = self._client.get_metric_history(self._run_id, f"{split}/epoch")
        return max((point.value for point in history), default=-1.0)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if not self._seen.has(split, metrics):
            self._log(step, split, metrics)

    def _log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(f"{split}/{name}", value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=points)

    def finding(self, told: Told) -> None:
        self._client.set_tag(self._run_id, f"health.{told.name}", told.as_text())

    def results(self, step: int, results: Mapping[str, float]) -> None:
        self._log(step, "final", results)

    def end(self, ending: Ending) -> None:
        self._client.set_terminated(self._run_id, status=_STATUS[ending])
