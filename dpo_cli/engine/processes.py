"""Processes of this machine, as /proc shows them: who is alive, who started whom, what belongs to one launch."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Process(NamedTuple):
    """started: clock ticks since the machine's start. A pid is given out again, the pair of both is not."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; one that has ended, and that its parent has not yet asked about, does not."""
        return process(self.pid) == self


def process(pid: int) -> Process | None:
    """The running process of this number, or None."""
    status = _status(pid)
    if status is None or status[0] in ("Z", "X"):
        return None
    return Process(pid, int(status[19]))


def this_process() -> Process:
    found = process(os.getpid())
    assert found is not None, "a process that reads /proc is alive"
    return found


def parent_of(pid: int) -> int:
    """The parent's number; 0 where there is none, or where it lies outside this container."""
    status = _status(pid)
    return int(status[1]) if status is not None else 0


def command_of(pid: int) -> list[str]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


@functools.cache
def pid_space() -> str:
    """Names the set of processes among which pids can be compared: this boot of this machine, or a container there."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return os.uname().nodename


def with_environment(variable: str, value: str) -> list[Process]:
    """Running processes, this one aside, that were started with this variable: children of any depth and session."""
    wanted = f"{variable}={value}".encode()
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            inside = wanted in (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended just now, or another user's
        if inside and (running := process(int(entry.name))) is not None:
            found.append(running)
    return found


def kill(running: Process) -> None:
    """SIGKILL, unless it has ended."""
    if running.is_alive:
        try:
            os.kill(running.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _status(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on: state, parent, ..., start time at index 19."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, the name in brackets, may hold spaces and brackets itself.
    return text.rpartition(")")[2].split()
