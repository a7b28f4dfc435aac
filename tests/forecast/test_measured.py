"""The forecast against the memory that a process really takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(
    "case",
    [
        "small",
        "small, checkpointed",
        "adapters",
        "bfloat16",
        "ZeRO-2, 2 ranks, bfloat16",
        "ZeRO-3, 2 ranks",
    ],
)
def test_a_forecast_is_within_fifteen_percent_of_what_is_measured(case: str) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts/bench/forecast.py"), "--case", case]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout.splitlines()[-1].split("|")[-3])
    assert 0.85 < ratio < 1.15
