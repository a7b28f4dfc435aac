"""Files of as many different pairs as are asked for: those of the embedded example, each with a number before it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

PAIRS = Path(__file__).resolve().parents[2] / "dpo_cli" / "example" / "pairs.jsonl"


def write_pairs(path: Path, rows: int) -> None:
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number, pair in enumerate(itertools.islice(itertools.cycle(pairs), rows)):
            file.write(json.dumps(pair | {"prompt": f"{number}. {pair['prompt']}"}) + "\n")
