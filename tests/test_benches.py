"""The benchmarks run: each of them small, its tables whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
DOCUMENT = BENCH.parents[1] / "docs" / "performance.md"
# How many tables each prints, and whether it has a side of TRL's.
BENCHES = {
    "scoring.py": (1, True),
    "pdpo_step.py": (1, False),
    "around.py": (2, True),
    "growth.py": (2, True),
    "learning.py": (1, True),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("script", BENCHES)
def test_a_benchmark_measures_every_side_and_prints_whole_tables(script: str, tmp_path: Path) -> None:
    tables, compared = BENCHES[script]
    if compared:
        pytest.importorskip("trl", reason="TRL is a development dependency: pip install trl")
    if script == "around.py":
        pytest.importorskip("deepspeed", reason="two ranks need DeepSpeed")
    command = [sys.executable, str(BENCH / script), "--quick", "--threads", "1", "--json", str(tmp_path / "kept.json")]
    environment = os.environ | {"PYTHONPATH": str(BENCH.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("|---") for line in lines) == tables
    for table in "\n".join(lines).split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    # What is there is not measured again.
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == done.stdout


def test_what_a_plan_wastes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pairs of 6 and 10 tokens: four rows of 8 for TRL, and one rank of two waits for 4 of 20."""
    monkeypatch.syspath_prepend(str(BENCH))
    from plan_waste import padded, waited
    from step_cases import Pair

    pairs = [Pair([1] * 2, [1] * 2, [1] * 2, 0.0, 0.0), Pair([1] * 2, [1] * 2, [1] * 6, 0.0, 0.0)]
    assert padded(pairs) == 4 * 8
    assert waited(pairs, 1) == 0.0
    assert waited(pairs, 2) == pytest.approx(1 - 16 / 20)


@pytest.mark.parametrize("script", [*BENCHES, "plan_waste.py"])
def test_the_document_has_a_place_for_a_benchmarks_tables(script: str) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(f"<!-- table: scripts/bench/{script} -->") == 1
    assert text.count(f"<!-- end of table: scripts/bench/{script} -->") == 1
