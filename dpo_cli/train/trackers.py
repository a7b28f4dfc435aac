"""Metrics for those who watch elsewhere: TensorBoard, under train/... and eval/..."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpo_cli.config.schema import LoggerConfig


class Trackers:
    """Every tracker of a run behind one call; none at all is fine."""

    def __init__(self, tensorboard_folder: Path | None = None) -> None:
        self._folder = tensorboard_folder
        self._writer: Any = None

    @classmethod
    def of(cls, logger: LoggerConfig, run_dir: Path) -> Trackers:
        return cls(None if logger.tensorboard is None else run_dir / logger.tensorboard.folder)

    def begin(self, after_step: int) -> None:
        """Open the tracker; what it holds of later steps than `after_step` is superseded, at 0 all that it holds."""
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=after_step + 1 if after_step else 0)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
