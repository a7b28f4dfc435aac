"""The same ranks under the launchers that users bring: whatever is killed, they save, and nothing is left."""

from __future__ import annotations

import os
import signal

import pytest

from .conftest import Launch, wait_until

pytestmark = pytest.mark.slow
LAUNCHERS = ["torchrun", "deepspeed"]


# Torchrun may be caught by a signal while it holds a lock, and then takes twice 30 seconds to notice that all is over.
ENDS_SECONDS = 75


def start(launched: Launch, launcher: str, *words: str, program: str = "rank.py") -> None:
    (launched.torchrun if launcher == "torchrun" else launched.deepspeed)(*words, program=program)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_do_their_work_end_with_0(launched: Launch, launcher: str) -> None:
    start(launched, launcher)
    done = launched.ended()
    assert done.returncode == 0
    assert "rank 0 speaks" in done.stdout
    assert "rank 1 speaks" not in done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_failing_rank_tells_of_its_error_on_the_screen_once(launched: Launch, launcher: str) -> None:
    start(launched, launcher, "all:not_finite")
    done = launched.ended()
    assert done.returncode != 0
    assert done.stderr.count("The loss of step 7 is not finite.") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_is_named_by_those_left_and_ends_them_in_seconds(launched: Launch, launcher: str) -> None:
    start(launched, launcher, "0:wait", "1:die")
    done = launched.ended(seconds=25)
    assert done.returncode != 0
    assert done.stderr.count("Rank 1 died without a word.") == 1


@pytest.mark.parametrize("killed", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_save_and_end_when_what_the_user_started_is_ended(
    launched: Launch, launcher: str, killed: signal.Signals
) -> None:
    start(launched, launcher, "all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    launched.signal(killed)
    assert launched.ended(seconds=ENDS_SECONDS).returncode != 0
    wait_until(lambda: not launched.running(), seconds=15)
    assert launched.saved() == ["saved-0", "saved-1"]


def test_ranks_save_and_end_when_deepspeeds_inner_launcher_is_killed(launched: Launch) -> None:
    start(launched, "deepspeed", "all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    os.kill(launched.below("deepspeed.launcher.launch"), signal.SIGKILL)
    launched.ended()
    wait_until(lambda: not launched.running(), seconds=15)
    assert launched.saved() == ["saved-0", "saved-1"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_of_the_terminal_saves(launched: Launch, launcher: str) -> None:
    start(launched, launcher, "all:wait")
    launched.wait_for("waiting-0", "waiting-1")
    assert launched.process is not None
    os.killpg(launched.process.pid, signal.SIGINT)
    launched.ended(seconds=ENDS_SECONDS)
    wait_until(lambda: not launched.running(), seconds=15)
    assert launched.saved() == ["saved-0", "saved-1"]
