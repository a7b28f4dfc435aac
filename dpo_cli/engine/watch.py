"""A rank ends when what started it is gone, or when another rank has failed: nothing else would ever tell it.

A launcher that is killed leaves its ranks running, and a rank that waits in a collective for one that died waits for
minutes. A thread looks at both, twice a second.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import PurePath

from dpo_cli.engine.environment import launched_by, stop_seconds
from dpo_cli.engine.outcome import EXIT_BUG, Failure, RankFiles
from dpo_cli.engine.processes import Process, command_of, parent_of, process

POLL_SECONDS = 0.5
# Ranks that fail together each want to say so; after this they are not waited for.
PEER_SECONDS = 3.0
_LAUNCHERS = {
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "dpo-train",
    "dpo_cli",
    "dpo_cli.cli.train",
    "dpo_cli.engine.torchrun",
    "torch.distributed.launch",
    "torch.distributed.run",
    "torchrun",
}


def launchers_above() -> list[Process]:
    """The launchers this process hangs from, nearest first, up to the first ancestor that is none, such as a shell."""
    found = []
    pid = parent_of(os.getpid())
    while pid and is_launcher(command_of(pid)) and (running := process(pid)) is not None:
        found.append(running)
        pid = parent_of(pid)
    expected = launched_by()
    if expected is not None and expected not in found:
        found.append(expected)  # gone already, or started by a program with another name
    return found


def is_launcher(command: list[str]) -> bool:
    """Whether this is a command line like `python -u -m torch.distributed.run ...` or `/usr/bin/deepspeed ...`."""
    return any(PurePath(word).name in _LAUNCHERS for word in command[:5])


class Watch:
    """Looks after one process from `start` to its end.

    A launcher's death asks for a stop as SIGTERM does, so that a checkpoint is saved; whoever has not ended after a
    bounded time is ended.
    """

    def __init__(self) -> None:
        self._launchers = launchers_above()
        self._bounded_seconds = stop_seconds()
        self._peers: tuple[RankFiles, int, Callable[[Failure], None]] | None = None
        self._deadline: float | None = None
        self._reason: Failure | None = None

    def start(self) -> None:
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def include_peers(self, files: RankFiles, rank: int, tell: Callable[[Failure], None]) -> None:
        """From now on, end also when another rank of this run folder has failed or died; `tell` of a death."""
        self._peers = (files, rank, tell)

    def _look(self) -> None:
        asked = False
        while True:
            if not asked and not all(launcher.is_alive for launcher in self._launchers):
                asked = True
                message = f"The launcher died, and this rank did not stop in {self._bounded_seconds:g} s."
                self._end_after(self._bounded_seconds, Failure(-1, EXIT_BUG, message))
                os.kill(os.getpid(), signal.SIGTERM)
            if self._peers is not None:
                with contextlib.suppress(OSError):  # a network file system hiccups; the next look will do
                    if (failure := self._peers[0].first_failure()) is not None:
                        self._end_after(PEER_SECONDS, failure)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end()
            time.sleep(POLL_SECONDS)

    def _end_after(self, seconds: float, reason: Failure) -> None:
        deadline = time.monotonic() + seconds
        if self._deadline is None or deadline < self._deadline:
            self._deadline, self._reason = deadline, reason

    def _end(self) -> None:
        code = EXIT_BUG if self._reason is None else self._reason.exit_code
        try:
            if self._peers is not None and self._reason is not None:
                files, rank, tell = self._peers
                files.end(rank, code, message=self._reason.message)
                if files.first_to_tell(self._reason):
                    tell(self._reason)
        finally:
            # Not sys.exit: the main thread may wait for ever inside a collective.
            os._exit(code)
