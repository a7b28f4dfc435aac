"""docs/metrics.md names what a run writes: no more, no less."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dpo_cli.cli.train import main

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SMALL = ["max_steps=2", "optimizer.warmup_steps=0", "global_pairs=4", "log_every=1", "eval_every=0", "data.workers=1"]
FEW = ["data.train=dpo_cli://example/heldout.jsonl", "data.eval=null", "data.eval_fraction=0.1"]
TASK = ["eval.task.limit=2", "eval.task.during=2", "eval.task.max_new_tokens=8", "rollout.max_new_tokens=48"]
EVERY_ROW_ONCE = {"step", "split"}
ON_KNOWN_GPUS = {"perf/mfu_pct"}
# Together they write every name there is.
DEFAULT_RUNS = [["loss=pdpo", "loss.nll_alpha=1"]]
OTHER_RUNS = [
    ["loss=dpo", "loss.use_weighting=true"],
    ["loss=cpo"],
    ["loss=simpo", "loss.nll_alpha=1"],
    ["loss=orpo"],
    ["loss=mix"],
    ["loss=kto"],
    ["loss=sft_ref"],
]


def documented() -> set[str]:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def written(words: list[str], folder: Path, number: int) -> set[str]:
    run = folder / str(number)
    problems = "eval.task.problems=dpo_cli://example/problems.jsonl"
    code = main(
        ["model=tiny", *words, *SMALL, *FEW, *TASK, problems, f"run_dir={run}", f"store_dir={folder / 'store'}"]
    )
    assert code == 0, words
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name for row in rows for name in row} - EVERY_ROW_ONCE


def test_what_a_run_writes_is_explained(tmp_path: Path) -> None:
    for number, words in enumerate(DEFAULT_RUNS):
        names = written(words, tmp_path, number)
        assert len(names) > 20
        assert names <= documented()


@pytest.mark.slow
def test_what_is_explained_is_what_runs_write(tmp_path: Path) -> None:
    names = [written(words, tmp_path, number) for number, words in enumerate([*DEFAULT_RUNS, *OTHER_RUNS])]
    assert set.union(*names) == documented() - ON_KNOWN_GPUS
