"""One start at a time works in a run folder, its ranks included."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_cli.cli import run_folder
from dpo_cli.cli.run_folder import exclusive
from dpo_cli.errors import CheckpointError

HOLD = """
import sys, time
from pathlib import Path
from dpo_cli.cli.run_folder import sharing
with sharing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def rank_at_work(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A rank whose dpo-train has died; it takes this long to save."""
    (folder / "ranks").mkdir(exist_ok=True)
    rank = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    assert rank.stdout.readline() == "held\n"
    return rank


def test_several_ranks_share_a_folder_and_a_new_start_waits_for_the_last(folder: Path) -> None:
    ranks = [rank_at_work(folder, 1.5), rank_at_work(folder, 1.5)]
    began = time.monotonic()
    with exclusive(folder):
        assert time.monotonic() - began > 0.5
    for rank in ranks:
        rank.communicate()


def test_a_new_start_does_not_wait_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_RANKS_END_SECONDS", 0.3)
    rank = rank_at_work(folder, 30)
    with pytest.raises(CheckpointError, match="still at work"), exclusive(folder):
        pass
    rank.kill()
    rank.communicate()
