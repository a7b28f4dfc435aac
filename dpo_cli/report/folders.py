"""Which folders are runs, and which may be written to: asked before anything heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dpo_cli.errors import CheckpointError, ConfigError

# Says that a folder is a report, and which files of it are.
MANIFEST = "report.json"
_OF_A_RUN = ("overrides.yaml", "config.yaml", "metrics.jsonl")
_SWEEP = "sweep.yaml"


def run_folders(named: Sequence[Path]) -> list[Path]:
    """The folders of single runs: a sweep's folder stands for its jobs. Raises CheckpointError for what is no run."""
    found: list[Path] = []
    for folder in named:
        if not folder.is_dir():
            what = "is a file, not a run folder" if folder.exists() else "does not exist"
            raise CheckpointError(f"{folder} {what}.", where="command line", hint="dpo-report outputs/RUN")
        if (folder / _SWEEP).exists():
            jobs = sorted((job for job in folder.iterdir() if _is_run(job)), key=lambda job: (len(job.name), job.name))
            if not jobs:
                raise CheckpointError(f"{folder} is a sweep none of whose runs has begun.", where="command line")
            found += jobs
        elif _is_run(folder):
            found.append(folder)
        else:
            raise CheckpointError(
                f"{folder} is not a run folder: it has neither of {', '.join(_OF_A_RUN)}.",
                where="command line",
                hint="name the folder that holds config.yaml and metrics.jsonl",
            )
    # The same run named twice, or as a sweep and by itself, is one run.
    return list(dict.fromkeys(folder.resolve() for folder in found))


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in _OF_A_RUN)


def check_replaceable(out: Path) -> None:
    """Raises ConfigError where writing a report to `out` would overwrite anything but a report."""
    if not out.exists() and not out.is_symlink():
        parent = next(folder for folder in out.absolute().parents if folder.exists())
        if not parent.is_dir():
            raise ConfigError(f"{parent} is a file, so {out} cannot be made in it.", where="out")
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder.", where="out", hint="out=ANOTHER")
    there = {str(file.relative_to(out)) for file in out.rglob("*") if not file.is_dir()}
    try:
        ours = set(json.loads((out / MANIFEST).read_bytes())["files"]) | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    others = sorted(there - ours)
    if others:
        what = "holds files that are no report's" if ours else "is not empty, and not a report"
        raise ConfigError(f"{out} {what}: {', '.join(others[:3])}.", where="out", hint="out=ANOTHER, or move them away")
