"""What came of a run, in a few numbers: read from its folder, without torch"""

from __future__ import annotations

import json
from pathlib import Path

from dpo_cli.train.metrics_log import read_metrics


def final_results(run_dir: Path) -> dict[str, float]:
    """The last training and held-out metrics as train/... and eval/..., and the task accuracy before and after.

    Task accuracies are fractions. Empty for a run that has not got far enough to have any.
    """
    results: dict[str, float] = {}
    file = run_dir / "metrics.jsonl"
    last = {row["split"]: row for row in read_metrics(file)} if file.exists() else {}
    for split in ("train", "eval"):
        for name, value in last.get(split, {}).items():
            if name not in ("step", "split") and value is not None:
                results[f"{split}/{name}"] = value
    task = run_dir / "task.json"
    if task.exists():
        kept = json.loads(task.read_bytes())
        for when in ("before", "after"):
            if kept.get(when):
                results[f"task_accuracy_{when}"] = sum(kept[when]) / len(kept[when])
    return results
