"""While a run works the screen is its own: what libraries print, log or warn of goes to a file of the run folder.

Libraries speak through `logging`, through `warnings`, and, those in C++ too, through the process's file descriptors.
"""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from dpo_cli.config.secrets import mask_tokens
from dpo_cli.errors import DpoError, as_mendable

LOG = "log.txt"
# What this tool itself has to say; without a log it is said on the screen alone.
OURS = logging.getLogger("dpo_cli")
OURS.addHandler(logging.NullHandler())
_PACKAGE = Path(__file__).resolve().parent.parent
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Where standard error led before a log took its place.
_screen_errors = 2


class LoggedBug(Exception):
    """A failure that its user cannot mend, shortly; `log` holds the whole traceback."""

    def __init__(self, error: BaseException, log: Path) -> None:
        self.is_ours, place = _place_of(error)
        self.log = log
        super().__init__(f"{type(error).__name__}: {error}\n  {place}\n  whole traceback: {log}")


def level_of(name: str) -> int:
    """The number that `logging` knows a log_level by."""
    return _LEVELS[name]


@contextmanager
def screen_to_ourselves(log: Path, *, level: str) -> Iterator[None]:
    """While open, `log` takes what others say, and OURS too. What Python code prints still reaches the screen.

    level: a log_level. Of libraries it takes warnings, at "debug" what they inform of as well.
    Raises LoggedBug from any Exception that its user cannot mend.
    """
    global _screen_errors
    with ExitStack() as before:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        out, errors = os.dup(1), os.dup(2)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        already_there = os.path.sameopenfile(file, 1)  # a rank that has no screen
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
        before.callback(os.close, out)
        before.callback(os.close, errors)
        before.callback(os.dup2, errors, 2)
        before.callback(os.dup2, out, 1)
        before.callback(sys.stderr.flush)
        _screen_errors = errors
        before.callback(_forget_screen)
        if _leads_to(sys.stdout) == 1:
            screen = os.fdopen(
                out, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1, closefd=False
            )
            before.enter_context(redirect_stdout(before.enter_context(screen)))
        before.enter_context(_logging_to(log, level=level, ours=not already_there))
        try:
            yield
        except DpoError as error:
            OURS.error("%s", error)
            raise
        except Exception as error:
            if isinstance(error, OSError) and as_mendable(error) is not None:
                raise
            os.write(2, mask_tokens("".join(traceback.format_exception(error))).encode())
            raise LoggedBug(error, log) from error


def tell_at_once(text: str) -> None:
    """Write to the screen past Python's buffers, which a signal may have interrupted in the middle of a write."""
    os.write(_screen_errors, text.encode())


def screen_is_ours() -> bool:
    """Whether what libraries write goes to a log."""
    return _screen_errors != 2


def screen_is_terminal() -> bool:
    return os.isatty(_screen_errors)


def _forget_screen() -> None:
    global _screen_errors
    _screen_errors = 2


@contextmanager
def _logging_to(log: Path, *, level: str, ours: bool) -> Iterator[None]:
    root = logging.getLogger()
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(_Masking(_FORMAT))
    levels = root.level, OURS.level
    root.addHandler(handler)
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    OURS.setLevel(level_of(level))
    OURS.propagate = ours
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        root.setLevel(levels[0])
        OURS.setLevel(levels[1])
        OURS.propagate = True
        handler.close()


class _Masking(logging.Formatter):
    """A library may log the address it fetches from, with the token that opens it."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_tokens(super().format(record))


def _leads_to(stream: object) -> int | None:
    """The file descriptor behind a stream; None for one that somebody has put in its place in memory."""
    try:
        number: int = stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return None
    return number


def _place_of(error: BaseException) -> tuple[bool, str]:
    """Whether the failure lies in this package, and the last line of it, or of its user's code, that was at work."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True, "nothing is known of where"
    not_theirs = (
        frame
        for frame in reversed(frames)
        if Path(frame.filename).is_relative_to(_PACKAGE) or not frame.filename.startswith((*_LIBRARIES, "<"))
    )
    last = next(not_theirs, frames[-1])
    inside = Path(last.filename).is_relative_to(_PACKAGE)
    file = Path(last.filename).relative_to(_PACKAGE.parent) if inside else Path(last.filename)
    return inside, f"{file}, line {last.lineno}, in {last.name}: {last.line}"
