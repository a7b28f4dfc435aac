"""A tracker in a thread of its own: however slow or broken it is, training neither waits for it nor ends by it"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue

from dpo_cli.config.secrets import mask_tokens
from dpo_cli.tracking.tracker import Tracker

# Lines that wait for a tracker which does not keep up; what comes on top is left out, as memory is the run's.
_WAITING_AT_MOST = 10_000
# How long the end of a run waits for trackers that are still sending, ...
CLOSING_SECONDS = 60.0
# ... and of one whose other ranks wait, in the midst of a step, to hear of this one's failure.
FAILING_SECONDS = 5.0

Action = Callable[[Tracker], str | None]


class Background:
    """Does with a tracker what it is told, in order. The first failure is told to the user, and no other."""

    def __init__(self, name: str, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.name = name
        self._tracker = tracker
        self._say = say
        self._failed = False
        self._silent = False
        self._saying = threading.Lock()
        self._queue: Queue[Action | None] = Queue()
        # A daemon: a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)

    def begin(self, action: Action) -> None:
        """Start working; where this first action fails, the tracker is left out for good."""
        self._queue.put(action)
        self._thread.start()

    def do(self, action: Action) -> None:
        if self._queue.qsize() < _WAITING_AT_MOST:
            self._queue.put(action)
        else:
            self._warn("it does not keep up; lines are left out")

    def end(self, action: Action) -> None:
        """Nothing comes after this action, which is never left out."""
        self._queue.put(action)
        self._queue.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until everything is done, but no longer than this."""
        self._thread.join(max(seconds, 0))
        if self._thread.is_alive():
            self._warn("it was still sending when the run had ended; what it lacks is in metrics.jsonl")

    def hush(self) -> None:
        """Say nothing from now on, whatever is still sent: where it would be said may be closed."""
        with self._saying:
            self._silent = True

    def _work(self) -> None:
        begun = False
        while (action := self._queue.get()) is not None:
            try:
                told = action(self._tracker)
                if told:
                    self._tell(f"{self.name}: {told}")
            except Exception as error:
                # Whatever a tracker's library raises: no kind of it may reach the training.
                self._warn(_reason(error))
                if not begun:
                    self._drain()
                    return
            begun = True

    def _drain(self) -> None:
        while self._queue.get() is not None:
            pass

    def _warn(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._tell(f"warning: the tracker {self.name} has failed, and training goes on without waiting: {reason}")

    def _tell(self, text: str) -> None:
        with self._saying:
            if not self._silent:
                self._say(text)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return mask_tokens(f"{type(error).__name__}: {lines[0][:300]}")
