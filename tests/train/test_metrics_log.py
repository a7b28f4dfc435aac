"""metrics.jsonl stays readable through kills, full disks and resumed runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_cli.errors import CheckpointError
from dpo_cli.train.metrics_log import MetricsLog, read_metrics


def _write(path: Path, *steps: int) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.append(step, "train", {"loss": step / 3})


def _steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_a_line_holds_step_and_split_first_then_the_metrics_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(7, "eval", {"loss": 0.1, "num_tokens": 12, "rewards/margins": 1 / 3})
        assert path.read_text() == (
            '{"step": 7, "split": "eval", "loss": 0.1, "num_tokens": 12, "rewards/margins": 0.3333333333333333}\n'
        )
    assert list(read_metrics(path)) == [
        {"step": 7, "split": "eval", "loss": 0.1, "num_tokens": 12, "rewards/margins": 1 / 3}
    ]


def test_nan_and_infinity_are_null_because_strict_readers_know_no_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(1, "train", {"a": float("nan"), "b": float("-inf"), "c": None})

    def refuse(name: str) -> None:
        raise ValueError(name)

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "split": "train", "a": None, "b": None, "c": None}


def test_every_line_can_be_read_at_once_by_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(3):
        log.append(step, "train", {})
        assert _steps(path) == list(range(step + 1))
    log.sync()
    log.close()


def test_resuming_drops_later_steps_and_the_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2, 3, 4, 5)
    with path.open("a") as file:
        file.write('{"step": 6, "spl')
    with MetricsLog(path) as log:
        log.truncate_after(3)
        log.append(4, "train", {"loss": 9.0})
    assert _steps(path) == [1, 2, 3, 4]
    assert list(read_metrics(path))[-1]["loss"] == 9.0
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_closes_nothing_that_goes_on_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.append(step, "train", {})
        log.truncate_after(1)
        log.append(2, "train", {})
    assert _steps(path) == [1, 2]


def test_truncating_a_log_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").truncate_after(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail", ["{", '{"step": 3, "split": "train"}', "\0" * 70_000])
def test_going_on_after_a_half_written_line_does_not_glue_the_next_one_to_it(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2)
    with path.open("a") as file:
        file.write(tail)
    assert _steps(path) == [1, 2]
    _write(path, 3)
    assert _steps(path) == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 1, 2, 3)
    path.write_text(path.read_text().replace('{"step": 2', '{"st'))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl line 2"):
        list(read_metrics(path))


def test_a_log_that_cannot_be_written_is_the_users_to_mend() -> None:
    with (
        pytest.raises(CheckpointError, match="cannot be written: No space left on device"),
        MetricsLog(Path("/dev/full")) as log,
    ):
        log.append(1, "train", {})


_LOG_FOR_EVER = """
import itertools, sys
from pathlib import Path
from dpo_cli.train.metrics_log import MetricsLog
log = MetricsLog(Path(sys.argv[1]))
for step in itertools.count():
    log.append(step, "train", {"loss": 0.5, "text": 1e-9 * step})
"""


def test_kill_minus_nine_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", _LOG_FOR_EVER, str(path)])
    while not path.exists() or path.stat().st_size < 200_000:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = _steps(path)
    assert steps == list(range(len(steps)))
    assert len(steps) > 1000
