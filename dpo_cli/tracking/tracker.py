"""What a tracker is told of a run, and what it is asked to do"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_cli.atomic import write_json
from dpo_cli.health.monitor import Told

Ending = Literal["finished", "stopped", "failed"]
_ID_FILE = "trackers.json"


@dataclass(frozen=True)
class RunFacts:
    """What a tracker calls a run by.

    id: of this run folder and no other, the same after every resume. name: that of the folder. group: that of the sweep
    it belongs to. tags: loss, model and data. settings: the whole configuration, without secrets.
    """

    folder: Path
    id: str
    name: str
    group: str | None
    tags: tuple[str, ...]
    settings: Mapping[str, Any]


def run_id(run_dir: Path) -> str:
    """The name that trackers know this run folder by; made up when first asked for, and kept in it."""
    file = run_dir / _ID_FILE
    if not file.exists():
        write_json(file, {"id": secrets.token_hex(4)})
    return str(json.loads(file.read_bytes())["id"])


class Tracker:
    """One place that metrics are sent to. It may be slow and it may fail: `Background` sees to it that nobody waits.

    All calls come from one thread, `begin` first and `end` last.
    """

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        """Open the run, or go on with it: what came after `after_step` is superseded. Returns what to tell the user."""
        raise NotImplementedError

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Finite numbers under their names in metrics.jsonl."""
        raise NotImplementedError

    def finding(self, told: Told) -> None:
        """A finding about the run's health; ignored where there is no place for it."""

    def results(self, step: int, results: Mapping[str, float]) -> None:
        """What came of the run, as final/..."""

    def flush(self) -> None:
        """Make sure that everything so far outlives the process."""

    def end(self, ending: Ending) -> None:
        """Close the run; waits for what is still to be sent."""


class Seen:
    """The last line of each split that a tracker which takes nothing back holds already; a resume repeats some.

    A run repeats itself bit for bit, so what is there already stays, and is not sent twice. Lines are compared by
    `epoch`, which every one has.
    """

    def __init__(self, last_epochs: Mapping[str, float]) -> None:
        self._last_epochs = last_epochs

    def has(self, split: str, metrics: Mapping[str, float]) -> bool:
        return metrics.get("epoch", float("inf")) <= self._last_epochs.get(split, -1.0)
