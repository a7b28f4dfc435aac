"""Ranks that dpo-train starts by itself: how they end, whatever ends them, and what the user is told."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from .conftest import Launch, wait_until


def test_a_launch_that_works_shows_rank_0_and_nothing_of_the_launcher(launched: Launch) -> None:
    launched.own()
    done = launched.ended()
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank 0 speaks\n", "")
    assert (launched.run_dir / "ranks" / "rank-00001.log").read_text() == "rank 1 speaks\n"
    assert [state.exit_code for state in launched.states()] == [0, 0]


@pytest.mark.slow
def test_a_taken_port_is_never_in_the_way(launched: Launch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launched.environment = {"MASTER_PORT": port, "PET_MASTER_PORT": port, "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}"}
        launched.own()
        assert launched.ended().returncode == 0


def test_an_error_of_any_rank_is_the_runs_error_with_its_exit_code(launched: Launch) -> None:
    launched.own("0:wait", "1:not_finite")
    done = launched.ended()
    assert done.returncode == 3
    assert done.stderr.endswith("dpo-train: The loss of step 7 is not finite.\n  try:   optimizer.lr=1e-7\n")


def test_a_bug_in_a_rank_shows_its_traceback_and_ends_the_others_in_seconds(launched: Launch) -> None:
    began = time.monotonic()
    launched.own("0:deaf", "1:bug")
    done = launched.ended()
    assert done.returncode == 1
    assert "in bug" in done.stderr
    assert done.stderr.splitlines()[-1] == "dpo-train: Rank 1 failed: ValueError: seven is not a tensor"
    assert time.monotonic() - began < 15


def test_a_rank_that_is_killed_is_named_with_the_signal_and_its_last_words(launched: Launch) -> None:
    launched.own("0:wait", "1:die")
    done = launched.ended()
    assert done.returncode == 1
    assert "rank 1 speaks" in done.stderr
    assert "dpo-train: Rank 1 was killed by signal 9 (SIGKILL).\n  try: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_the_first_failure_is_told_not_the_broken_connection_that_follows(launched: Launch, failing: str) -> None:
    other = "1" if failing == "0" else "0"
    launched.own(f"{other}:broken_connection", f"{failing}:die")
    done = launched.ended()
    assert done.returncode == 1
    assert f"Rank {failing} was killed by signal 9" in done.stderr
    assert "Connection closed" not in done.stderr


@pytest.mark.slow
def test_a_new_launch_forgets_how_an_earlier_one_ended(launched: Launch) -> None:
    launched.own("all:bug")
    assert launched.ended().returncode == 1
    launched.own()
    assert launched.ended().returncode == 0


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_which_saves_and_the_run_exits_with_75(
    launched: Launch, sent: signal.Signals
) -> None:
    launched.own("all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    launched.signal(sent)
    done = launched.ended()
    assert done.returncode == 75
    assert launched.saved() == ["saved-0", "saved-1"]
    assert f"Stopped by {sent.name}. Step 3 is saved.\n  try:   dpo-train resume=here" in done.stderr


@pytest.mark.slow
def test_ctrl_c_of_the_terminal_comes_once(launched: Launch) -> None:
    launched.own("all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    assert launched.process is not None
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.ended().returncode == 75
    assert launched.saved() == ["saved-0", "saved-1"]


def test_a_signal_before_any_rank_has_started_ends_the_run(launched: Launch) -> None:
    launched.own("all:wait")
    wait_until(lambda: len(launched.running()) > 1)
    launched.signal(signal.SIGTERM)
    done = launched.ended()
    assert done.returncode == 75, done
    assert "Stopped by SIGTERM" in done.stderr


def test_a_second_ctrl_c_leaves_at_once(launched: Launch) -> None:
    launched.own("all:deaf")
    launched.wait_for("waiting-0", "waiting-1")
    launched.signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    launched.signal(signal.SIGINT)
    assert launched.ended().returncode == 130
    assert time.monotonic() - began < 2


@pytest.mark.slow
def test_a_rank_that_does_not_heed_a_signal_is_killed_after_a_while(launched: Launch) -> None:
    launched.own("0:wait", "1:deaf", stop_seconds=2)
    launched.wait_for("waiting-0", "waiting-1")
    began = time.monotonic()
    launched.signal(signal.SIGTERM)
    done = launched.ended()
    assert done.returncode == 75
    assert launched.saved() == ["saved-0"]
    assert 1.5 < time.monotonic() - began < 8


@pytest.mark.slow
def test_a_signal_to_torchrun_itself_stops_the_run_in_the_same_way(launched: Launch) -> None:
    launched.own("all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    os.kill(launched.below("dpo_cli.engine.torchrun"), signal.SIGTERM)
    assert launched.ended().returncode == 75
    assert launched.saved() == ["saved-0", "saved-1"]


@pytest.mark.slow
def test_ranks_save_and_end_when_torchrun_is_killed(launched: Launch) -> None:
    launched.own("all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    os.kill(launched.below("dpo_cli.engine.torchrun"), signal.SIGKILL)
    assert launched.ended().returncode == 75
    assert launched.saved() == ["saved-0", "saved-1"]


@pytest.mark.parametrize("behaviour", ["wait", pytest.param("deaf", marks=pytest.mark.slow)])
def test_nothing_is_left_when_dpo_train_itself_is_killed(launched: Launch, behaviour: str) -> None:
    launched.own(f"all:{behaviour}", stop_seconds=3)
    launched.wait_for("waiting-0", "waiting-1")
    launched.signal(signal.SIGKILL)
    launched.ended()
    wait_until(lambda: not launched.running(), seconds=12)
    assert launched.saved() == (["saved-0", "saved-1"] if behaviour == "wait" else [])
