"""What came of the jobs of a sweep, side by side: on the screen, as sweep.csv and as sweep.json"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.atomic import replacing, write_json
from dpo_cli.cli.sweep.jobs import Job, Outcomes
from dpo_cli.config.schema import SweepConfig
from dpo_cli.config.secrets import mask
from dpo_cli.train.results import final_results

# Shown beside the metric that a sweep is sorted by, where jobs have them.
_SHOWN = ("eval/rewards/accuracies", "eval/loss", "task_accuracy_after")
_WIDTH = 200
_DIGITS = 8


@dataclass(frozen=True)
class Row:
    """values: what the job was given that others were not. results: see `final_results`."""

    job: int
    values: dict[str, str]
    state: str
    results: dict[str, float]


def compare(jobs: Sequence[Job], outcomes: Outcomes, folder: Path, settings: SweepConfig) -> list[Row]:
    """The jobs, best first; those without the metric last. Writes sweep.csv and sweep.json."""
    rows = [
        Row(
            job.number,
            {key: mask(f"{key}={value}").partition("=")[2] for key, value in job.values},
            outcomes.state(job.number),
            final_results(folder / str(job.number)),
        )
        for job in jobs
    ]
    sign = -1 if settings.direction == "maximize" else 1
    rows.sort(key=lambda row: (settings.metric not in row.results, sign * row.results.get(settings.metric, 0), row.job))
    write_json(
        folder / "sweep.json",
        {
            "metric": settings.metric,
            "direction": settings.direction,
            "jobs": [
                {"job": row.job, "overrides": row.values, "state": row.state, "results": row.results} for row in rows
            ],
        },
    )
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    names = list(dict.fromkeys(name for row in rows for name in row.results))
    with replacing(folder / "sweep.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["job", *keys, "state", *names])
        for row in rows:
            given = [row.values.get(key, "") for key in keys]
            writer.writerow([row.job, *given, row.state, *(row.results.get(name, "") for name in names)])
    return rows


def show(rows: Sequence[Row], folder: Path, settings: SweepConfig) -> None:
    """The table on the screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = [
        name
        for name in dict.fromkeys((settings.metric, *_SHOWN))
        if name == settings.metric or any(name in row.results for row in rows)
    ]
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    table = Table(title=f"{folder}, best {settings.metric} first", title_justify="left")
    for heading in ("job", *keys, *names, "state"):
        table.add_column(Text(heading), justify="right" if heading in names else "left", overflow="fold")
    for row in rows:
        given = [_short(row.values.get(key, "")) for key in keys]
        measured = [f"{row.results[name]:.4g}" if name in row.results else "-" for name in names]
        table.add_row(*(Text(cell) for cell in (str(row.job), *given, *measured, row.state)))
    # In a file or a pipe there is no edge to keep to.
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)
    print(f"all of it: {folder / 'sweep.csv'}, {folder / 'sweep.json'}")


def _short(value: str) -> str:
    """A number that was drawn has more digits than say anything."""
    try:
        return value if len(value) <= _DIGITS else f"{float(value):.4g}"
    except ValueError:
        return value
