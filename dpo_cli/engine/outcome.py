"""How each rank ended, as files of the run folder: an exit code passes through launchers that lose or invent some.

ranks/rank-00001.json   which process the rank is, and with what it ended
ranks/rank-00001.log    what it printed; rank 0 prints to the screen, and what libraries say there goes to log.txt
ranks/failure.json      the first failure, which explains those that follow from it
ranks/exits.json        exit codes of workers that died without a word, where the launcher is ours
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from dpo_cli.atomic import write_json
from dpo_cli.config.secrets import mask_tokens
from dpo_cli.engine.processes import Process, pid_space, this_process
from dpo_cli.engine.screen import LOG, LoggedBug
from dpo_cli.errors import EXIT_INTERRUPTED, DpoError, RankFailed

EXIT_BUG = 1
FOLDER = "ranks"
_LOG_LINES_SHOWN = 20


@dataclass(frozen=True)
class Failure:
    """What a rank failed of. detail: a traceback, or the last lines of a log; empty where the message says it all."""

    rank: int
    exit_code: int
    message: str
    where: str | None = None
    hint: str | None = None
    detail: str = ""

    @staticmethod
    def of(rank: int, error: BaseException, *, traceback: str) -> Failure:
        if isinstance(error, DpoError):
            return Failure(rank, error.exit_code, mask_tokens(error.message), error.where, error.hint)
        if isinstance(error, LoggedBug):
            return Failure(rank, EXIT_BUG, mask_tokens(f"Rank {rank} failed: {error}"))
        return Failure(
            rank,
            EXIT_BUG,
            mask_tokens(f"Rank {rank} failed: {type(error).__name__}: {error}"),
            detail=mask_tokens(traceback) + "This is a bug of dpo-cli, not of your input.",
        )

    def as_error(self) -> RankFailed:
        return RankFailed(self.message, exit_code=self.exit_code, where=self.where, hint=self.hint)


@dataclass(frozen=True)
class RankState:
    """exit_code: None while it runs. space: where its pid means anything. message, hint: what it ended with."""

    rank: int
    pid: int
    started: int
    space: str
    exit_code: int | None = None
    message: str = ""
    hint: str | None = None

    @property
    def may_have_died(self) -> bool:
        """Whether it has ended without saying so, or is on another machine, from where nobody can tell."""
        return self.exit_code is None and not Process(self.pid, self.started).is_alive


class RankFiles:
    """The ranks/ of a run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / FOLDER
        # Read once each, then looked after by pid: many ranks that read many files twice a second would load a network
        # file system.
        self._begun: dict[str, RankState] = {}

    def clear(self) -> None:
        """Forget an earlier start; before any rank of this one begins."""
        self.folder.mkdir(exist_ok=True)
        for pattern in ("rank-*", "failure.json", "exits.json", "told"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)

    def log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05}.log"

    def begin(self, rank: int) -> None:
        self._write(RankState(rank, *this_process(), pid_space()))

    def end(self, rank: int, exit_code: int, *, message: str = "", hint: str | None = None) -> None:
        self._write(RankState(rank, *this_process(), pid_space(), exit_code, message, hint))

    def _write(self, state: RankState) -> None:
        write_json(self.folder / f"rank-{state.rank:05}.json", asdict(state))

    def states(self) -> list[RankState]:
        """What the ranks have written so far, in rank order."""
        return [state for file in self._state_files() if (state := _read_state(file)) is not None]

    def died(self) -> list[RankState]:
        """Ranks of this machine that have ended without a word."""
        found = []
        for file in self._state_files():
            if file.name not in self._begun and (state := _read_state(file)) is not None:
                self._begun[file.name] = state
            state = self._begun.get(file.name)
            if state is None or state.space != pid_space() or not state.may_have_died:
                continue
            # It was running when its file was read, and may have said since that it ends.
            state = _read_state(file) or state
            self._begun[file.name] = state
            if state.exit_code is None:
                found.append(state)
        return found

    def ended(self) -> int:
        """How many ranks have begun and are no more; those of other machines count as no more."""
        return sum(not Process(state.pid, state.started).is_alive for state in self.states())

    def _state_files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.json"))

    def failure(self) -> Failure | None:
        found = _read(self.folder / "failure.json")
        return Failure(**found) if found is not None else None

    def claim(self, failure: Failure) -> bool:
        """Make this the run's failure, unless another one came before it. Raises OSError where nothing is written."""
        try:
            with (self.folder / "failure.json").open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(failure), indent=2))
        except FileExistsError:
            return False
        return True

    def first_failure(self) -> Failure | None:
        """The failure that was claimed; if there is none, a rank that died without a word is claimed to be it."""
        found = self.failure()
        if found is None and (dead := self.died()):
            # Launchers end the others with SIGTERM once one has died.
            first = min(dead, key=lambda state: self._exit_of(state.rank) == -Signals.SIGTERM)
            self.claim(self.describe_death(first.rank))
            found = self.failure()
        return found

    def first_to_tell(self, death: Failure) -> bool:
        """Whether this rank is to tell of another's death: each of those left has found it, and one is enough."""
        if death != self.describe_death(death.rank):
            return False  # no death but a failure, of which that rank tells itself
        try:
            (self.folder / "told").touch(exist_ok=False)
        except OSError:
            return False
        return True

    def write_exits(self, codes: dict[int, int]) -> None:
        write_json(self.folder / "exits.json", {str(rank): code for rank, code in codes.items()})

    def _exit_of(self, rank: int) -> int | None:
        """Of a process that has ended, where the launcher has told."""
        code = (_read(self.folder / "exits.json") or {}).get(str(rank))
        return code if isinstance(code, int) else None

    def describe_death(self, rank: int) -> Failure:
        """A rank that has written nothing: its exit code if we know it, and the last it printed."""
        code = self._exit_of(rank)
        how, hint = "died without a word", None
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({_signal_name(-code)})"
        elif code is not None:
            how = f"ended with exit code {code} and without a word"
        if code in (None, -9):
            hint = "the kernel kills without a word when memory runs out: dmesg | tail"
        log = self.log(rank) if rank else self.folder.parent / LOG
        lines = _last_lines(log)
        detail = "\n".join([f"The last lines of {log}:", *lines]) if lines else ""
        return Failure(rank, EXIT_BUG, f"Rank {rank} {how}.", hint=hint, detail=mask_tokens(detail))


def settle(files: RankFiles, *, seconds: float) -> Failure | None:
    """Wait whether a failure turns up of which the caller's own may be a mere consequence: a broken connection, say."""
    deadline = time.monotonic() + seconds
    while (found := files.first_failure()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def interruption(states: Sequence[RankState]) -> RankState | None:
    """The first rank that stopped because it was asked to."""
    return next((state for state in states if state.exit_code == EXIT_INTERRUPTED), None)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or being written
    return content if isinstance(content, dict) else None


def _read_state(file: Path) -> RankState | None:
    content = _read(file)
    return RankState(**content) if content is not None else None


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 16_384))
            return file.read().decode(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
    except OSError:
        return []


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:
        return "unknown"
