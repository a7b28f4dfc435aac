"""Metrics as a table in the run folder, for spreadsheets: one row a step and split"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.atomic import replacing
from dpo_cli.config.schema import CsvConfig
from dpo_cli.tracking.tracker import Ending, RunFacts, Tracker
from dpo_cli.train.metrics_log import read_metrics

_KEYS = ("step", "split")


class CsvFile(Tracker):
    """What metrics.jsonl holds. Columns keep their places: a metric that comes later gets one at the end.

    The table is written anew from metrics.jsonl when the run begins or resumes, when a column comes, and after a
    failure; rows are appended in between.
    """

    def __init__(self, config: CsvConfig) -> None:
        self._config = config
        self._file = Path()
        self._metrics = Path()
        self._columns: list[str] = []
        self._written: set[tuple[int, str]] = set()
        self._whole = False

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        self._file = run.folder / self._config.file
        self._metrics = run.folder / "metrics.jsonl"
        if self._file.exists():
            with self._file.open(newline="") as file:
                self._columns = next(csv.reader(file), [])
        self._write_anew()
        return None

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if (step, split) in self._written:
            return
        if not self._whole or not self._columns or not metrics.keys() <= set(self._columns):
            self._write_anew()
            return
        # What a failing disk leaves of this row must not be continued by the next.
        self._whole = False
        with self._file.open("a", newline="") as file:
            self._writer(file).writerow({"step": step, "split": split, **metrics})
        self._whole = True

    def _write_anew(self) -> None:
        rows = list(read_metrics(self._metrics)) if self._metrics.exists() else []
        self._columns = list(dict.fromkeys([*self._columns, *_KEYS, *(name for row in rows for name in row)]))
        with replacing(self._file) as temporary, temporary.open("w", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)
        # The run may be ahead of this thread: what it still has to say of these rows is known already.
        self._written = {(row["step"], row["split"]) for row in rows}
        self._whole = True

    def _writer(self, file: Any) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, lineterminator="\n")

    def end(self, ending: Ending) -> None:
        # Only a row that the disk refused is still missing.
        if not self._whole:
            self._write_anew()
