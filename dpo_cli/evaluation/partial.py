"""Responses that are finished, kept until all are: what was sampled before a stop or a kill is not sampled again.

Every start of every rank appends to a file of its own, so that no two processes write to one file, and a line that a
kill cut off is the last of its file.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.atomic import write_json
from dpo_cli.data.example import IntArray
from dpo_cli.errors import CheckpointError

SETTINGS = "settings.json"


class PartialResponses:
    """A folder of finished responses, all sampled under the same settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder, or make sure that what lies there was sampled under the same settings; one process does.

        settings: everything that decides a response, as plain JSON values. Raises CheckpointError where they differ.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / SETTINGS
        wanted = json.loads(json.dumps(settings))
        if not file.exists():
            write_json(file, wanted)
            return
        kept = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*kept, *wanted} if kept.get(key) != wanted.get(key))
        if differing:
            raise CheckpointError(
                f"Responses sampled with another {', '.join(differing)} are kept for this file.",
                where=str(self.folder),
                hint=f"out=ANOTHER, give the earlier command again, or delete {self.folder}",
            )

    def read(self) -> dict[int, list[IntArray]]:
        """Finished responses by the numbers of their questions."""
        found: dict[int, list[IntArray]] = {}
        for file in sorted(self.folder.glob("part-*.jsonl")):
            with file.open("rb") as lines:
                for line in lines:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        break  # cut off by a kill, as the last line of its file
                    found[entry["question"]] = [np.array(ids, dtype=np.int32) for ids in entry["responses"]]
        return found

    def writer(self) -> PartWriter:
        return PartWriter(self.folder / f"part-{os.getpid()}-{secrets.token_hex(4)}.jsonl")


class PartWriter:
    """One start of one rank. The file is made with its first responses."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, responses: Mapping[int, Sequence[IntArray]]) -> None:
        """Append and sync: once this returns, the responses outlive a kill."""
        lines = [
            json.dumps({"question": number, "responses": [ids.tolist() for ids in each]}, separators=(",", ":"))
            for number, each in responses.items()
        ]
        with self.path.open("a", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
