"""From a file of pairs to token ids, in a process of its own: `data_sides.py SIDE PAIRS SCRATCH` prints JSON.

ours: what `dpo-train` does, checks and counts included. trl: `load_dataset` and what DPOTrainer does with its rows.
Both read JSONL and leave a memory-mapped file; one process, and the embedded example's tokenizer.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from bench_report import own_bytes
from transformers import AutoTokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "dpo_cli" / "example"
MAX_TOKENS = 256


def ours(pairs: str, scratch: Path) -> Callable[[], int]:
    from dpo_cli.data.prepare import prepare_data
    from dpo_cli.data.settings import DataSettings

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "base")
    settings = DataSettings(pairs, max_tokens=MAX_TOKENS, workers=1)
    stops = frozenset([int(tokenizer.eos_token_id)])
    return lambda: len(
        prepare_data(settings, tokenizer, kind="pair", stop_token_ids=stops, seed=0, store_dir=scratch).train
    )


def trl(pairs: str, scratch: Path) -> Callable[[], int]:
    from datasets import load_dataset
    from trl import DPOTrainer
    from trl_side import arguments

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "base")
    settings = arguments(str(scratch), max_length=MAX_TOKENS)
    # Of the trainer, preparing its rows takes the tokenizer alone.
    trainer = SimpleNamespace(_tokenizer=tokenizer)

    def prepare() -> int:
        rows = load_dataset("json", data_files=pairs, split="train", cache_dir=str(scratch / "cache"))
        return len(DPOTrainer._prepare_dataset(trainer, rows, tokenizer, settings, "train"))

    return prepare


def main() -> None:
    warnings.simplefilter("ignore")
    side, pairs, scratch = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    prepare = {"ours": ours, "trl": trl}[side](pairs, scratch)
    base, began = own_bytes(), (time.perf_counter(), time.process_time())
    rows = prepare()
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps({"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "base_bytes": base}))


if __name__ == "__main__":
    main()
