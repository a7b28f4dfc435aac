"""Start the ranks of a run on this machine, stand in for them to the user, and leave nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dpo_cli.engine import processes
from dpo_cli.engine.environment import DEFAULT_STOP_SECONDS, MARK, for_workers
from dpo_cli.engine.outcome import Failure, RankFiles, interruption
from dpo_cli.errors import Interrupted, RankFailed

_POLL_SECONDS = 0.2
# Ranks end within seconds of the first failure; what hangs then is killed.
_FAILURE_SECONDS = 10.0
# A signal that reaches torchrun while it asks after a worker leaves it with a lock that it then waits for, as long as
# its workers may take to stop.
_TORCHRUN_SECONDS = 3.0


def launch(command: Sequence[str], *, workers: int, run_dir: Path, stop_seconds: float = DEFAULT_STOP_SECONDS) -> None:
    """Run `command` as `workers` ranks under torchrun, and wait for all of them.

    The first SIGINT or SIGTERM is passed on; ranks that have not ended `stop_seconds` later are killed. Whatever
    happens, no process of the launch outlives this call. Each rank must go through `run_as_rank`.
    Raises Interrupted when the ranks stopped because they were asked to, KeyboardInterrupt after a second Ctrl-C,
    otherwise RankFailed with message and exit code of the rank that failed first.
    """
    files = RankFiles(run_dir)
    files.clear()
    mark = secrets.token_hex(8)
    environment = for_workers(mark=mark, threads=max(1, _cores() // workers), seconds=stop_seconds)
    with _Signals.passed_on() as signals:
        torchrun = subprocess.Popen(
            [sys.executable, "-P", "-m", "dpo_cli.engine.torchrun", str(workers), str(run_dir), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            # Out of the terminal's reach: Ctrl-C is to come once, from here.
            start_new_session=True,
        )
        signals.receiver = torchrun
        try:
            _wait(torchrun, files, workers, mark, signals, stop_seconds)
        finally:
            _kill_all(mark)
            torchrun.wait()
    _judge(files, workers, torchrun.returncode, signals)


def workers_on(device: str, *, wanted: int | None) -> int:
    """As many as are wanted, else one for every GPU that this process may use, else one. Touches no GPU.

    device: as in hardware.device; "cpu" uses none.
    """
    if wanted is not None:
        return wanted
    if device == "cpu":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


class _Signals:
    """What the user has sent so far, passed on to `receiver`."""

    def __init__(self) -> None:
        self.receiver: subprocess.Popen[bytes] | None = None
        self.first: signal.Signals | None = None
        self.first_at = 0.0
        self.at_once = False

    @staticmethod
    @contextmanager
    def passed_on() -> Iterator[_Signals]:
        signals = _Signals()
        before = {number: signal.signal(number, signals.hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield signals
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self.first_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT:
            self.at_once = True
        self.pass_on()

    def pass_on(self) -> None:
        """Repeated by the waiting loop's start: the first may come before there is anybody to receive it."""
        if self.first is not None and self.receiver is not None and self.receiver.poll() is None:
            self.receiver.send_signal(self.first)


def _wait(
    torchrun: subprocess.Popen[bytes],
    files: RankFiles,
    workers: int,
    mark: str,
    signals: _Signals,
    stop_seconds: float,
) -> None:
    """Until every process of the launch has ended, or has had the time it is given."""
    if signals.first is not None:
        signals.pass_on()
    end: float | None = None
    while torchrun.poll() is None or processes.with_environment(MARK, mark):
        now = time.monotonic()
        if signals.at_once:
            raise KeyboardInterrupt
        # The ranks notice the death of their launcher, and stop as if they had been asked to.
        limit = stop_seconds if signals.first or (torchrun.returncode or 0) < 0 else None
        if _has_failed(files) or (torchrun.returncode is not None and limit is None):
            limit = _FAILURE_SECONDS
        if files.ended() == workers:
            limit = _TORCHRUN_SECONDS
        if limit is not None:
            end = now + limit if end is None else min(end, now + limit)
        if end is not None and now > end:
            return
        time.sleep(_POLL_SECONDS)


def _has_failed(files: RankFiles) -> bool:
    try:
        return files.first_failure() is not None
    except OSError:
        return bool(files.died())  # the disk takes no record of it


def _kill_all(mark: str) -> None:
    """Until a look finds none: what is being started while another is killed is found the next time."""
    while running := processes.with_environment(MARK, mark):
        for one in running:
            processes.kill(one)
        time.sleep(_POLL_SECONDS / 10)


def _judge(files: RankFiles, workers: int, returncode: int, signals: _Signals) -> None:
    """Return when all ranks did their work; raise what stands for the run otherwise."""
    states = files.states()
    if len(states) == workers and all(state.exit_code == 0 for state in states):
        return
    failure = files.failure()
    silent = [state for state in states if state.exit_code is None]
    # A rank that dies of the signal it was sent, or is killed for not heeding it, has not failed.
    expected = signals.first is not None and failure is not None and failure.rank in {state.rank for state in silent}
    if failure is not None and not expected:
        raise _shown(_explained(failure, files))
    if signals.first is not None:
        stopped = interruption(states)
        if silent and stopped is not None:
            names = ", ".join(str(state.rank) for state in silent)
            message = f"Stopped by {signals.first.name}. Ranks that did not end in time and were killed: {names}."
            raise Interrupted(message, hint=stopped.hint)
        if stopped is None:
            raise Interrupted(f"Stopped by {signals.first.name}. What was saved before is as it was.")
        raise Interrupted(stopped.message, hint=stopped.hint)
    if silent:
        raise _shown(files.describe_death(silent[0].rank))
    stopped = interruption(states)
    if stopped is not None:
        raise Interrupted(stopped.message, hint=stopped.hint)
    raise RankFailed(
        f"{len(states)} of {workers} workers started; their launcher ended with exit code {returncode}.",
        where=str(files.folder),
    )


def _explained(failure: Failure, files: RankFiles) -> Failure:
    """Whoever found a dead rank did not know of what it died; by now the launcher has said so."""
    dead = next((state for state in files.states() if state.rank == failure.rank), None)
    return files.describe_death(failure.rank) if dead is not None and dead.exit_code is None else failure


def _shown(failure: Failure) -> RankFailed:
    if failure.detail:
        print(failure.detail, file=sys.stderr)
    return failure.as_error()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
