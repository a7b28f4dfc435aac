"""metrics.jsonl: one JSON object a line, `step` and `split` first, then metric names and numbers; samples.jsonl alike.

A line is written with one call and handed to the system at once, so a kill loses at most the line being written. After
a resume the steps since the checkpoint are run again; `truncate_after` takes their first version out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dpo_cli.atomic import replacing
from dpo_cli.errors import CheckpointError


class MetricsLog:
    """Appends to one file of lines. Raises CheckpointError when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def append(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Write one line. NaN and infinities become null: JSON knows no others, and readers fail on Python's."""
        self.append_row({"step": step, "split": split, **{name: _strict(value) for name, value in values.items()}})

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Write one line of anything that JSON knows; `step` is what it goes by when a run is resumed."""
        line = json.dumps(row, allow_nan=False)
        try:
            if self._file is None:
                _drop_half_written_line(self.path)
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            data = (line + "\n").encode()
            if (written := os.write(self._file, data)) != len(data):
                # The disk filled in the middle of the line; the second try says so itself.
                os.write(self._file, data[written:])
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Make sure everything so far outlives a power cut; called with every checkpoint."""
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise self._unwritable(error) from error

    def truncate_after(self, step: int, *, evaluation_due: bool = False) -> None:
        """Drop the lines of later steps, and any that are not whole; the file is replaced in one go.

        evaluation_due: the evaluation of `step` itself will be recorded again, so its line is dropped too.
        """
        self.close()
        if not self.path.exists():
            return
        try:
            with replacing(self.path) as temporary, self.path.open("rb") as old, temporary.open("wb") as new:
                for line in old:
                    row = _parse(line)
                    if row is None or row["step"] > step:
                        continue
                    if not (evaluation_due and row["step"] == step and row.get("split") == "eval"):
                        new.write(line)
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the metrics cannot be written: {error.strerror or error}.",
            where=str(self.path),
            hint="free some space; resume= then goes on from the last checkpoint",
        )


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl, also of one being written: a half-written last line is left out.

    Raises CheckpointError naming a line in the middle that is not whole.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parse(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n"):
                raise CheckpointError("this line of the metrics is not a JSON object.", where=f"{path} line {number}")


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _strict(value: float | None) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _drop_half_written_line(path: Path) -> None:
    """Cut a tail without a newline off, so that the next line does not continue it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < whole:
            file.truncate(end)
