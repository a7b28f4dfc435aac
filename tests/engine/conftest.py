"""Real launches of small programs, and a search for what they leave running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from dpo_cli.engine.outcome import RankFiles, RankState
from dpo_cli.engine.processes import command_of, kill, with_environment

PROGRAMS = Path(__file__).parent / "programs"
BIN = Path(sys.executable).parent
_MARK = "DPO_TEST_LAUNCH"


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def wait_until(met: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@dataclass
class Launch:
    """One launch in a folder of its own, in a process group of its own, as a shell starts it."""

    run_dir: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *words: str | Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with (self.run_dir / "out").open("w") as out, (self.run_dir / "err").open("w") as err:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdout=out, stderr=err, text=True, process_group=0,
                env={**environment, "DS_ACCELERATOR": "cpu", **self.environment, _MARK: self.mark},
            )  # fmt: skip

    def own(self, *words: str, program: str = "rank.py", stop_seconds: float = 20) -> None:
        """Under our own launcher."""
        self.start(sys.executable, PROGRAMS / "parent.py", str(stop_seconds), self.run_dir, PROGRAMS / program, *words)

    def torchrun(self, *words: str, program: str = "rank.py") -> None:
        RankFiles(self.run_dir).clear()
        self.start(BIN / "torchrun", "--standalone", "--nproc-per-node=2", PROGRAMS / program, self.run_dir, *words)

    def deepspeed(self, *words: str, program: str = "rank.py") -> None:
        RankFiles(self.run_dir).clear()
        self.start(
            BIN / "deepspeed", "--no_local_rank", "--num_gpus=2", "--master_port", str(_free_port()),
            PROGRAMS / program, self.run_dir, *words,
        )  # fmt: skip

    def ended(self, *, seconds: float = 60) -> Ended:
        assert self.process is not None
        returncode = self.process.wait(timeout=seconds)
        return Ended(returncode, (self.run_dir / "out").read_text(), (self.run_dir / "err").read_text())

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait_for(self, *names: str) -> None:
        wait_until(lambda: all((self.run_dir / name).exists() for name in names))

    def below(self, word: str) -> int:
        """The pid of this launch's process with this word in its command line, ranks and the first process aside."""
        assert self.process is not None
        ranks = {state.pid for state in self.states()} | {self.process.pid}
        found = [one.pid for one in self.running() if one.pid not in ranks and _has(command_of(one.pid), word)]
        assert len(found) == 1, found
        return found[0]

    def running(self) -> list:  # type: ignore[type-arg]
        return with_environment(_MARK, self.mark)

    def states(self) -> list[RankState]:
        return RankFiles(self.run_dir).states()

    def saved(self) -> list[str]:
        return sorted(file.name for file in self.run_dir.glob("saved-*"))


def _has(command: list[str], word: str) -> bool:
    return any(word in part for part in command)


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launch]:
    """A launch of which nothing may be left a moment after the test."""
    launch = Launch(tmp_path)
    yield launch
    try:
        wait_until(lambda: not launch.running(), seconds=5)
    finally:
        for one in launch.running():
            kill(one)
