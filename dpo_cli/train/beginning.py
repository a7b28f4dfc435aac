"""What a run began with, in run.json; one that goes on must have the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.atomic import write_json
from dpo_cli.errors import CheckpointError

FILE = "run.json"


def compare_with_beginning(run_dir: Path, here: dict[str, Any], *, say: Callable[[str], None]) -> None:
    """Keep `here` where nothing is kept yet; else compare.

    here: `data` and `model`, by their digests, and `environment`, by name.
    Raises CheckpointError for other data or another model; says what of the environment has changed.
    """
    file = run_dir / FILE
    if not file.exists():
        write_json(file, here)
        return
    began = json.loads(file.read_text())
    for part, hint in (("data", "put the data back as they were"), ("model", "put the model back as it was")):
        if began[part] != here[part]:
            raise CheckpointError(
                f"The {part} is not what this run began with.", where=str(file), hint=f"{hint}, or start a new run"
            )
    for name, old in began["environment"].items():
        now = here["environment"].get(name)
        if now != old:
            say(f"note: {name} was {old} and is {now} now; the last bits of the results may differ")
