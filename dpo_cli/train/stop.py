"""Ctrl-C and SIGTERM: finish the step and save; a second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dpo_cli.engine.ranks import Ranks
from dpo_cli.engine.screen import screen_is_terminal, tell_at_once
from dpo_cli.errors import Interrupted

EXIT_SECOND_CTRL_C = 130
# A launcher passes on to its ranks the Ctrl-C that the terminal may have sent them as well: one key, two signals.
_SAME_KEY_SECONDS = 1.0


class _Stopped(BaseException):
    """Raised out of whatever is being done; `listening` turns it into Interrupted.

    No Exception: a library's `except Exception` would take it for its own failure.
    """


class StopRequest:
    """Whether somebody asked the run to end.

    requested: the signal's name. kept: what is on disk already, for the message of a stop that nothing defers.
    tell: shows the user that a deferred signal was heard; it is called in the middle of anything.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell or (lambda text: tell_at_once(f"\n{text}\n"))
        self.requested: str | None = None
        self.kept = "No step was taken yet, so there was nothing to save."
        self._deferred = False
        self._raised = False
        self._requested_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT and SIGTERM; put the old handlers back at the end."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        except _Stopped:
            self.check(self.kept)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While open, a signal only raises the flag: whoever opened it looks at the flag and saves its work."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop. All ranks must call this together, and hear the same."""
        for heard in ranks.gather(self.requested):
            self.requested = self.requested or heard
            if heard:
                return True
        return False

    def check(self, saved: str) -> None:
        """Raise Interrupted if a stop was requested; `saved` says what will be found on resuming."""
        if self.requested:
            raise Interrupted(f"Stopped by {self.requested}. {saved}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and not self._is_echo():
            # A progress display that is cut off leaves the terminal without its cursor.
            tell_at_once("\x1b[?25h\n" if screen_is_terminal() else "")
            os._exit(EXIT_SECOND_CTRL_C)
        repeated = self.requested is not None
        if not repeated:
            self.requested, self._requested_at = signal.Signals(number).name, time.monotonic()
        if not self._deferred and not self._raised:
            # Once only: launchers repeat themselves, and a second one would cut off what the first has set going.
            self._raised = True
            raise _Stopped
        if not repeated:
            self._tell(f"{self.requested}: finishing this step and saving; a second Ctrl-C leaves at once.")

    def _is_echo(self) -> bool:
        return "RANK" in os.environ and time.monotonic() - self._requested_at < _SAME_KEY_SECONDS
