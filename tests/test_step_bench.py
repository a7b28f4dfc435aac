"""The step benchmark runs, and both trainers do the same work in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "step.py"
# TRL sums float32 log-probs in float32.
ROUNDING = 2e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_all_sides_have_the_same_losses_and_a_ratio_is_told(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is a development dependency: pip install trl")
    told = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--json", str(told)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    runs = json.loads(told.read_text(encoding="utf-8"))["cases"]["quick"]["runs"]
    (ours,) = runs.pop("ours")
    assert len(ours["losses"]) == 4
    assert len(set(ours["losses"])) == 4, "losses that never change would prove little"
    assert set(runs) == {"trl", "fair", "grouped"}
    for side, (run,) in runs.items():
        # The timed steps of the length-grouped side have other pairs.
        compared = 1 if side == "grouped" else 4
        assert run["losses"][:compared] == pytest.approx(ours["losses"][:compared], rel=ROUNDING)
    (fair,) = (line for line in done.stdout.splitlines() if "TRL, fair |" in line and "**" in line)
    ratios = [float(cell.strip(" *")) for cell in fair.split("|") if "**" in cell]
    assert len(ratios) == 3 and min(ratios) > 0
