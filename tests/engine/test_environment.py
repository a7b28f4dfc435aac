"""What launchers say, and how they are known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dpo_cli.engine.environment import for_workers, is_worker, launched_by, take_local_rank
from dpo_cli.engine.processes import process, this_process, with_environment
from dpo_cli.engine.watch import is_launcher


@pytest.mark.parametrize("words", [["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]])
def test_deepspeeds_option_moves_into_the_environment(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    # Set first, so that what the call leaves behind is undone.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("LOCAL_RANK")
    assert take_local_rank(["loss=dpo", *words, "--cfg", "job"]) == ["loss=dpo", "--cfg", "job"]
    assert os.environ["LOCAL_RANK"] == "3"


def test_what_the_launcher_has_set_itself_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert take_local_rank(["--local_rank=3"]) == []
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "command",
    [
        "python -m torch.distributed.run --nnodes 1 train.py",
        "/venv/bin/python /venv/bin/torchrun -m dpo_cli",
        "/venv/bin/python /venv/bin/deepspeed --num_gpus 8 --module dpo_cli",
        "/venv/bin/python -u -m deepspeed.launcher.launch --world_info=x",
        "/venv/bin/python /venv/bin/dpo-train loss=dpo",
        "python -m dpo_cli loss=dpo",
    ],
)
def test_launchers_are_known_by_their_command_line(command: str) -> None:
    assert is_launcher(command.split())


@pytest.mark.parametrize(
    "command", [["bash", "-c", "torchrun -m dpo_cli"], ["/sbin/init"], ["-zsh"], ["slurmstepd: [1.0]"], ["tmux"], [""]]
)
def test_shells_and_the_like_may_end_without_ending_a_run(command: list[str]) -> None:
    assert not is_launcher(command)


def test_only_rank_and_world_size_together_make_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "0")
    assert not is_worker()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_worker()


def test_workers_know_who_launched_them_and_keep_the_users_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert for_workers(mark="m", threads=2, seconds=60)["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("OMP_NUM_THREADS")
    told = for_workers(mark="m", threads=2, seconds=60)
    assert told["OMP_NUM_THREADS"] == "2"
    assert launched_by() is None
    monkeypatch.setenv("DPO_LAUNCHED_BY", told["DPO_LAUNCHED_BY"])
    assert launched_by() == this_process()


def test_a_process_that_has_ended_is_not_alive_even_before_its_parent_asks() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={"DPO_MARK": "here"})
    running = process(child.pid)
    assert running is not None
    assert running.is_alive
    assert [one.pid for one in with_environment("DPO_MARK", "here")] == [child.pid]
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not running.is_alive
    child.communicate()
