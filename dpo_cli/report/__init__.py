"""From run folders to one page: `dpo_cli.report.write([RUN, ...], FOLDER)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write a report of these runs, or sweeps, into the folder `out`, whole or not at all; returns the page.

    One run gets a page of its own, several a comparison. A report that is in `out` already is replaced.
    Raises CheckpointError for a folder that is no run, ConfigError where `out` holds anything but a report.
    """
    # Only here are torch and matplotlib imported.
    from dpo_cli.report.document import write_report

    return write_report(runs, out)
