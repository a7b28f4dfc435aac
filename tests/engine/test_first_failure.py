"""Which of several ranks that died without a word is told of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dpo_cli.engine.outcome import RankFiles

BEGIN = "import os, sys; from pathlib import Path; from dpo_cli.engine.outcome import RankFiles; "
BEGIN += "RankFiles(Path(sys.argv[1])).begin(int(sys.argv[2]))"


def test_a_rank_that_was_told_to_end_is_not_the_one_that_failed(tmp_path: Path) -> None:
    files = RankFiles(tmp_path)
    files.clear()
    for rank in ("0", "1"):
        assert subprocess.run([sys.executable, "-c", BEGIN, tmp_path, rank], check=False).returncode == 0
    files.write_exits({0: -15, 1: -9})
    failure = files.first_failure()
    assert failure is not None and failure.message == "Rank 1 was killed by signal 9 (SIGKILL)."
