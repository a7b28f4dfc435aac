"""Ranks wait for rank 0 without a process group, and then make one through the same store."""

from __future__ import annotations

import pytest

from dpo_cli.engine.rendezvous import hand_over

from .conftest import Launch

LAUNCHERS = [
    pytest.param("own", marks=pytest.mark.slow),
    pytest.param("torchrun", marks=pytest.mark.slow),
    pytest.param("deepspeed", marks=pytest.mark.slow),
]


def start(launched: Launch, launcher: str, mode: str) -> None:
    {"own": launched.own, "torchrun": launched.torchrun, "deepspeed": launched.deepspeed}[launcher](
        mode, program="handing.py"
    )


def test_a_single_process_hands_over_to_itself() -> None:
    assert hand_over(lambda: "outputs/run") == "outputs/run"


@pytest.mark.parametrize("group", ["store", "env"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_has_what_rank_0_made_and_a_process_group_can_follow(
    launched: Launch, launcher: str, group: str
) -> None:
    start(launched, launcher, group)
    launched.ended()
    for rank in ("0", "1"):
        assert (launched.run_dir / rank).read_text() == "made by rank 0 and again 2", (
            launched.run_dir / "err"
        ).read_text()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failure_of_rank_0_ends_the_others_with_its_exit_code(launched: Launch, launcher: str) -> None:
    start(launched, launcher, "fails")
    assert launched.ended().returncode != 0
    assert (launched.run_dir / "0").read_text() == "There are no pairs. 2"
    assert (launched.run_dir / "1").read_text() == "Rank 0 has ended. 2"
