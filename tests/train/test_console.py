"""What is shown of a run: on terminals of any width, in a pipe, and what stays."""

from __future__ import annotations

import io
import math
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dpo_cli.durations import as_clock, in_words
from dpo_cli.health.curves import Finding, Severity
from dpo_cli.health.monitor import Told
from dpo_cli.train.console import RunConsole
from dpo_cli.train.panel import Panel

STEP = {"loss": 0.51, "rewards/margins": 1.25, "rewards/accuracies": 0.75, "perf/tokens_per_second": 12345.0}
FOUND = Told("chosen_falling", Finding(Severity.WARNING, "it falls", "because", ("loss.beta=1",)), 20, "train")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(width: int, height: int = 30, encoding: str = "utf-8") -> Console:
    file = Terminal()
    file.__dict__["encoding"] = encoding
    return Console(file=file, width=width, height=height, force_terminal=True, highlight=False, soft_wrap=True)


def lines_of(panel: Panel, width: int, height: int = 30) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(panel)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def full_panel() -> Panel:
    panel = Panel(100, 40, facts={"reference": "1,000 responses, 900 from the store, 100 scored"})
    for step in range(40):
        panel.take("train", STEP | {"loss": 1 / (step + 1), "perf/mfu_pct": 41.25, "generator/eos_rate": 0.5})
    panel.take("eval", {"loss": 0.6, "rewards/margins": math.nan})
    panel.find(FOUND)
    return panel


@pytest.mark.parametrize("width", [20, 60, 100, 160])
def test_no_line_reaches_the_last_column_and_no_row_is_lost(width: int) -> None:
    lines = lines_of(full_panel(), width)
    assert max(map(len, lines)) < width
    starts = ["", "training", "loss", "margin", "accuracy", "speed", "reference", "generator", "health"]
    assert [line.split(" ")[0] for line in lines] == starts


def test_it_tells_progress_curves_speed_and_health() -> None:
    text = "\n".join(lines_of(full_panel(), 120))
    for part in ("40/100", "40%", "0.0250", "▁", "held out    0.6000", "12,345 tokens/s", "MFU 41.2%", "50% ended",
                 "900 from the store", "warning at step 20: chosen_falling, it falls"):  # fmt: skip
        assert part in text


def test_a_low_terminal_shows_the_first_lines_only() -> None:
    assert len(lines_of(full_panel(), 100, height=4)) == 3


def test_a_finished_training_leaves_its_summary_and_nothing_of_the_live_view() -> None:
    screen = terminal(100)
    console = RunConsole(screen)
    with console.training(4):
        for step in range(1, 5):
            console.metrics(step, 4, "train", STEP | {"loss": 1 / step})
            console.advance(step)
        console.find(FOUND)
    left = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "chosen_falling" in left
    summary = left[left.rindex("trained") :]
    assert "4 steps in" in summary
    assert "1.0000 → 0.2500" in summary and "█" in summary
    assert "\x1b[1A" not in summary, "nothing is drawn over what stays"
    assert left.count("train step") == 0


def test_where_nothing_can_be_drawn_over_lines_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TERM", "dumb"), ("CI", "true")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            screen = Console(file=Terminal(), force_terminal=True, width=100, highlight=False, soft_wrap=True)
            console = RunConsole(screen)
            with console.training(2):
                console.metrics(1, 2, "train", STEP)
                console.advance(1)
            assert screen.file.getvalue() == (  # type: ignore[attr-defined]
                "train step 1/2  loss 0.5100  margin +1.250  accuracy 75.0%  tok/s 12,345\n"
            )


def test_a_resumed_run_s_curves_begin_where_they_began() -> None:
    screen = terminal(100)
    history = [{"step": step, "split": "train", "loss": float(step)} for step in (1, 2, 3)]
    console = RunConsole(screen)
    with console.training(4, 3, lambda: history):
        console.metrics(4, 4, "train", STEP)
        console.advance(4)
    assert "1.0000 → 0.5100" in screen.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("debug", ["why", "what", "note: mind"]),
        ("info", ["what", "note: mind"]),
        ("warning", ["note: mind"]),
        ("error", []),
    ],
)
def test_log_level_decides_what_is_said(level: str, said: list[str], tmp_path: Path) -> None:
    screen = Console(file=io.StringIO())
    console = RunConsole(screen, level=level)
    console.explain("why")
    console.say("what")
    console.say("note: mind")
    assert screen.file.getvalue().splitlines() == said  # type: ignore[attr-defined]


def test_durations_read_as_people_write_them() -> None:
    assert [as_clock(seconds) for seconds in (12.3, 184, 3750)] == ["12 s", "3:04", "1:02:30"]
    assert [in_words(seconds) for seconds in (12.34, 184, 3750)] == ["12.3 s", "3 min 4 s", "1 h 2 min"]


def test_a_reader_that_leaves_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        console = RunConsole()
        console.say("to nobody")
        console.say("nor this")
        monkeypatch.undo()
