"""TensorBoard: event files in the run folder"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dpo_cli.config.schema import TensorBoardConfig
from dpo_cli.health.monitor import Told
from dpo_cli.tracking.tracker import Ending, RunFacts, Tracker


class TensorBoard(Tracker):
    """Scalars as train/... and eval/...; configuration and findings as texts. Superseded steps are hidden."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self._config = config
        self._writer: Any = None

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(run.folder / self._config.folder), purge_step=after_step + 1 if after_step else 0
        )
        settings = yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True)
        # Markdown shows what is indented by four as it stands.
        self._writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()), after_step)
        return None

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def finding(self, told: Told) -> None:
        self._writer.add_text(f"health/{told.name}", told.as_text(), told.step)

    def results(self, step: int, results: Mapping[str, float]) -> None:
        self.log(step, "final", results)

    def flush(self) -> None:
        self._writer.flush()

    def end(self, ending: Ending) -> None:
        self._writer.close()
