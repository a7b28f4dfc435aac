"""One rank of a distributed run, from its start to an exit code that everybody hears of."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dpo_cli.engine.environment import launched_by, rank, world_size
from dpo_cli.engine.outcome import Failure, RankFiles, settle
from dpo_cli.engine.watch import POLL_SECONDS, Watch
from dpo_cli.errors import EXIT_INTERRUPTED, DpoError

# A peer's death breaks this rank's connections at once, and may be noticed only a little later.
_SETTLE_SECONDS = 3 * POLL_SECONDS


def run_as_rank(body: Callable[[], None], *, run_dir: Path, watch: Watch, show: Callable[[Failure], None]) -> NoReturn:
    """Call `body`, record in the run folder how it ended, and leave the process.

    show: prints a failure on the screen; called on one rank at most, and on none where `launch` waits above to do so.
    """
    files = RankFiles(run_dir)
    screen = os.dup(2)
    if rank() != 0:
        _print_to(files.log(rank()))

    def tell(failure: Failure) -> None:
        os.dup2(screen, 2)
        show(failure)

    files.begin(rank())
    watch.include_peers(files, rank(), tell if launched_by() is None else lambda failure: None)
    code, mine_to_tell = _call(body, files)
    if mine_to_tell is not None:
        tell(mine_to_tell)
    leave(code)


def leave(code: int) -> NoReturn:
    """End a process that was a rank, past the interpreter's own way out.

    Threads of torch.distributed now and then abort that one, after all is done: "terminate called without an active
    exception", SIGABRT, and the launcher calls the run failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _call(body: Callable[[], None], files: RankFiles) -> tuple[int, Failure | None]:
    """The exit code, and the failure that is this rank's to show."""
    try:
        body()
    except BaseException as error:
        # What is written now must not be cut off; the watch and the launchers bound how long it takes.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        mine = Failure.of(rank(), error, traceback=traceback.format_exc())
        try:
            code, told = _failed(error, mine, files)
        except OSError:
            return mine.exit_code, mine  # a full disk takes no record of itself either
        return code, told if launched_by() is None else None
    files.end(rank(), 0)
    return 0, None


def _failed(error: BaseException, mine: Failure, files: RankFiles) -> tuple[int, Failure | None]:
    interrupted = isinstance(error, DpoError) and error.exit_code == EXIT_INTERRUPTED
    alone = world_size() == 1
    if isinstance(error, DpoError):
        before = files.first_failure()
    else:
        before = None if alone else settle(files, seconds=_SETTLE_SECONDS)
    if before is not None:
        files.end(rank(), before.exit_code, message=before.message)
        return before.exit_code, before if files.first_to_tell(before) else None
    if interrupted:
        files.end(rank(), mine.exit_code, message=mine.message, hint=mine.hint)
        return mine.exit_code, mine if rank() == 0 else None
    first = files.claim(mine)
    files.end(rank(), mine.exit_code, message=mine.message)
    return mine.exit_code, mine if first else None


def _print_to(log: Path) -> None:
    """Send everything that this process and its children print to a file, libraries written in C included."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
