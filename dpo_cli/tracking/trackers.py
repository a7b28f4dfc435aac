"""Every tracker of a run behind one call; none at all is fine"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpo_cli.config.schema import Config, LoggerConfig
from dpo_cli.config.secrets import without_secrets
from dpo_cli.errors import EndedEarly, Interrupted
from dpo_cli.health.monitor import Told
from dpo_cli.tracking.background import CLOSING_SECONDS, FAILING_SECONDS, Background
from dpo_cli.tracking.csv_file import CsvFile
from dpo_cli.tracking.mlflow import Mlflow
from dpo_cli.tracking.tensorboard import TensorBoard
from dpo_cli.tracking.tracker import Ending, RunFacts, Tracker, run_id
from dpo_cli.tracking.trackio import Trackio
from dpo_cli.tracking.wandb import Wandb

# A sweep's folder holds it beside the folders of its jobs.
_SWEEP_FILE = "sweep.yaml"


class Trackers:
    """What a run tells whoever watches. Of several ranks the main one has trackers, the others have none.

    ranks: how many there are.
    """

    def __init__(self, config: Config, run_dir: Path, trackers: Mapping[str, Tracker], *, ranks: int = 1) -> None:
        self._config = config
        self._run_dir = run_dir
        self._trackers = trackers
        self._ranks = ranks
        self._working: Sequence[Background] = ()

    @classmethod
    def of(cls, config: Config, run_dir: Path, *, ranks: int = 1) -> Trackers:
        return cls(config, run_dir, _chosen(config.logger), ranks=ranks)

    @classmethod
    def none(cls, config: Config, run_dir: Path) -> Trackers:
        return cls(config, run_dir, {})

    def begin(self, after_step: int, say: Callable[[str], None]) -> None:
        """Open all of them; what they hold of later steps than `after_step` is superseded, at 0 all that they hold."""
        if not self._trackers:
            return
        run = _facts(self._config, self._run_dir)
        self._working = [Background(name, tracker, say) for name, tracker in self._trackers.items()]
        for background in self._working:
            background.begin(lambda tracker: tracker.begin(run, after_step))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for background in self._working:
            background.do(lambda tracker: tracker.log(step, split, finite))

    def finding(self, told: Told) -> None:
        for background in self._working:
            background.do(lambda tracker: tracker.finding(told))

    def results(self, step: int, results: Mapping[str, float]) -> None:
        for background in self._working:
            background.do(lambda tracker: tracker.results(step, results))

    def flush(self) -> None:
        for background in self._working:
            background.do(lambda tracker: tracker.flush())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ending = _ending(error)
        for background in self._working:
            background.end(lambda tracker: tracker.end(ending))
        deadline = time.monotonic() + (FAILING_SECONDS if ending == "failed" and self._ranks > 1 else CLOSING_SECONDS)
        try:
            for background in self._working:
                background.wait(deadline - time.monotonic())
        finally:
            for background in self._working:
                background.hush()


def _chosen(logger: LoggerConfig) -> dict[str, Tracker]:
    kinds: dict[str, Callable[[Any], Tracker]] = {
        "tensorboard": TensorBoard, "csv": CsvFile, "wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio,
    }  # fmt: skip
    wanted = {name: getattr(logger, name) for name in kinds}
    return {name: kinds[name](settings) for name, settings in wanted.items() if settings is not None}


def _facts(config: Config, run_dir: Path) -> RunFacts:
    folder = run_dir.absolute()
    group = folder.parent.name if (folder.parent / _SWEEP_FILE).exists() else None
    model = config.model.path.rstrip("/").rpartition("/")[2]
    data = Path(config.data.train[0].path).name
    return RunFacts(
        folder=folder,
        id=run_id(folder),
        name=f"{group}-{folder.name}" if group else folder.name,
        group=group,
        tags=tuple(dict.fromkeys((config.loss.name, model, data))),
        settings=without_secrets(config.as_dict()),
    )


def _ending(error: BaseException | None) -> Ending:
    if error is None or isinstance(error, EndedEarly):
        return "finished"
    return "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
