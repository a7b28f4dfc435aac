"""Launches two ranks: `parent.py STOP_SECONDS RUN_DIR PROGRAM WORDS...`; speaks and exits as dpo-train does."""

from __future__ import annotations

import sys
from pathlib import Path

from dpo_cli.cli.train import exit_code_of
from dpo_cli.engine.launch import launch

stop_seconds, run_dir, program, *words = sys.argv[1:]


def run() -> None:
    launch(
        [sys.executable, "-u", program, run_dir, *words],
        workers=2,
        run_dir=Path(run_dir),
        stop_seconds=float(stop_seconds),
    )


raise SystemExit(exit_code_of(run))
