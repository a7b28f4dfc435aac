"""What a user sees of a real run: a live view on a terminal, plain lines in a pipe, and the rest in log.txt."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path

from .conftest import DPO_TRAIN, Workplace

_PATIENCE_SECONDS = 120.0
NOISY_LOSS = """
import logging, sys, warnings

def noisy(pair, *, target):
    print("printed by its user")
    warnings.warn("warned of by a library")
    logging.getLogger("library").warning("logged by a library, hf_" + "a" * 34)
    print("printed by a library", file=sys.stderr)
    margin = pair.policy_chosen - pair.policy_rejected - pair.reference_chosen + pair.reference_rejected
    return (margin - target) ** 2

def broken(pair, *, target):
    return pair.policy_chosn * target
"""


class TerminalRun:
    """dpo-train in a terminal of its own."""

    def __init__(self, workplace: Workplace, *words: str, columns: int) -> None:
        environment = {**workplace.environment, "TERM": "xterm-256color"}
        for name in ("CI", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.seen = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(workplace.folder)
            os.execve(DPO_TRAIN, [DPO_TRAIN, *workplace.defaults, *words], environment)
        self.resize(columns)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def read_until(self, reached: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not reached(self.seen):
            assert time.monotonic() < deadline, self.seen
            self.seen += os.read(self._terminal, 65536).decode(errors="replace")

    def end(self) -> int:
        """Its exit code, after all it had to show."""
        while True:
            try:
                shown = os.read(self._terminal, 65536)
            except OSError:  # Linux's way of telling that nobody writes any more
                break
            if not shown:
                break
            self.seen += shown.decode(errors="replace")
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_has_a_live_view_that_follows_its_width_and_leaves_a_summary(workplace: Workplace) -> None:
    run = TerminalRun(workplace, "max_steps=20000", "eval_every=0", "run_dir=run", columns=100)
    run.read_until(lambda seen: "margin" in seen.rpartition("training ")[2])
    assert "reference  " in run.seen
    run.resize(44)
    before = len(run.seen)

    def narrow(seen: str) -> bool:
        """Whether the last whole frame is; some may have been drawn before the terminal was resized."""
        frames = without_colours(seen[before:]).replace("\r", "").split("\ntraining ")
        return len(frames) > 2 and max(map(len, frames[-2].splitlines())) < 44

    run.read_until(narrow)
    run.press(b"\x03")
    assert run.end() == 75
    left = without_colours(run.seen[run.seen.rindex("\x1b[1A") :]).replace("\r", "").splitlines()
    assert re.fullmatch(r"stopped    after \d+ of 20,000 steps in .*", left[0]), left
    assert [line.split(" ")[0] for line in left[1:4]] == ["loss", "margin", "accuracy"]
    assert left[-1] == "  try:   dpo-train resume=run"
    # Hidden while frames are drawn; whoever leaves shows it again.
    assert run.seen.rindex("\x1b[?25h") > run.seen.rindex("\x1b[?25l")


def test_a_pipe_has_plain_lines_and_others_words_are_in_the_log(workplace: Workplace) -> None:
    folder = workplace.folder
    (folder / "noisy_losses.py").write_text(NOISY_LOSS)
    (folder / "conf/loss").mkdir(parents=True)
    for name in ("noisy", "broken"):
        text = f"_target_: noisy_losses.{name}\n_partial_: true\ntarget: 1.0\n"
        (folder / f"conf/loss/{name}.yaml").write_text(text)
    mine = [*workplace.defaults, "--config-dir", "conf", "max_steps=2"]

    done = workplace.shell(*mine, "loss=noisy", "run_dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert re.search(r"^train step 2/2  loss \d", done.stdout, re.MULTILINE)
    assert "printed by its user" in done.stdout and "by a library" not in done.stdout
    log = (folder / "run/log.txt").read_text()
    for part in ("UserWarning: warned of by a library", "WARNING library: logged by a library", "printed by a library"):
        assert part in log
    assert "train step 2/2" in log and "hf_a" not in log

    failed = workplace.call(*mine, "loss=broken", "run_dir=failed")
    assert failed.returncode == 1
    place = (
        f"{folder}/noisy_losses.py, line {1 + NOISY_LOSS[: NOISY_LOSS.index('policy_chosn')].count(chr(10))}, in broken"
    )
    for part in ("AttributeError", place, "whole traceback: failed/log.txt", "code of yours"):
        assert part in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "Traceback" in (folder / "failed/log.txt").read_text()


def test_log_level_quietens_screen_and_log_alike(workplace: Workplace) -> None:
    done = workplace.train("max_steps=2", "log_level=error", "run_dir=run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "INFO" not in Path(workplace.folder / "run/log.txt").read_text()
