"""While a run works the screen is its own, and afterwards everything is as it was."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest

from dpo_cli.durations import in_words
from dpo_cli.engine.screen import OURS, LoggedBug, screen_to_ourselves, tell_at_once
from dpo_cli.errors import DataError


def test_the_screen_has_what_python_prints_and_the_log_everything_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    with screen_to_ourselves(log, level="info"):
        print("for the user")
        os.write(1, b"from C++ on 1\n")
        os.write(2, b"from C++ on 2\n")
        logging.getLogger("library").info("informed")
        logging.getLogger("library").warning("warned")
        warnings.warn("python warned", stacklevel=1)
        OURS.info("ours")
        tell_at_once("at once\n")
    os.write(2, b"afterwards\n")
    said = capfd.readouterr()
    assert said.out == "for the user\n"
    assert said.err == "at once\nafterwards\n"
    text = log.read_text()
    for part in ("from C++ on 1", "from C++ on 2", "WARNING library: warned", "python warned", "INFO    dpo_cli: ours"):
        assert part in text
    assert "informed" not in text


def test_debug_keeps_what_libraries_inform_of(tmp_path: Path) -> None:
    with screen_to_ourselves(tmp_path / "log.txt", level="debug"):
        logging.getLogger("library").info("informed")
        OURS.debug("ours")
    text = (tmp_path / "log.txt").read_text()
    assert "informed" in text and "ours" in text


def test_streams_handlers_and_levels_are_those_of_before_even_after_a_failure(tmp_path: Path) -> None:
    def now() -> tuple[object, ...]:
        root, files = logging.getLogger(), list(Path("/proc/self/fd").iterdir())
        return sys.stdout, sys.stderr, list(root.handlers), root.level, OURS.level, len(files)

    before = now()
    for error in (DataError("bad row"), KeyboardInterrupt()):
        with pytest.raises(type(error)), screen_to_ourselves(tmp_path / "log.txt", level="info"):
            raise error
    assert now() == before
    assert "ERROR   dpo_cli: bad row" in (tmp_path / "log.txt").read_text()


def test_a_bug_is_told_by_its_last_line_in_this_package(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(LoggedBug) as caught, screen_to_ourselves(log, level="info"):
        in_words(None)  # type: ignore[arg-type]
    assert caught.value.is_ours
    assert "dpo_cli/durations.py, line " in str(caught.value) and "in in_words" in str(caught.value)
    assert "Traceback" in log.read_text() and "Traceback" not in str(caught.value)


def test_a_full_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"), screen_to_ourselves(tmp_path / "log.txt", level="info"):
        raise OSError(28, "No space left on device")
