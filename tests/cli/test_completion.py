"""Completion: what is offered, and that a real bash puts it on the line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_cli.cli.completion import candidates
from dpo_cli.cli.train import main
from dpo_cli.config.shipped import choices

# Fills COMPREPLY as readline would have it filled, and prints what would stand on the line.
_PRESS_TAB = """
eval "$({python} -m dpo_cli --completion bash)"
compopt() {{ :; }}
COMP_LINE=$1 COMP_POINT=${{#1}}
_dpo_cli dpo-train
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def test_groups_keys_and_sections_complete_step_by_step() -> None:
    assert candidates("dpo-train", "dpo-train lo") == ["loss=", "logger=", "log_every=", "log_level=", "loss."]
    assert "model.lora." in candidates("dpo-train", "dpo-train model.")
    assert "model.lora.rank=" in candidates("dpo-train", "/bin/dpo-train seed=1 model.lora.")
    assert candidates("dpo-train", "dpo-train loss=kto loss.d") == ["loss.desirable_weight="]
    assert candidates("dpo-train", "dpo-train optimizer=rmsprop optimizer.mo") == ["optimizer.momentum="]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dpo-train loss=", [f"loss={name}" for name in choices("loss")]),
        ("dpo-train model=qwen2-7", ["model=qwen2-7b"]),
        ("dpo-train logger=", [*(f"logger=[{name}]" for name in choices("logger")), "logger=[]"]),
        ("dpo-train log_level=", [f"log_level={level}" for level in ("debug", "info", "warning", "error")]),
        ("dpo-train deterministic=t", ["deterministic=true"]),
        ("dpo-train optimizer.schedule=c", ["optimizer.schedule=cosine", "optimizer.schedule=constant"]),
        ("dpo-train show=h", ["show=hardware"]),
        ("dpo-train --completion ", ["bash", "zsh", "fish"]),
        ("dpo-train data.train=", []),  # left to the shell, which knows files
        ("dpo-data con", ["convert"]),
        ("dpo-data convert data.on_b", ["data.on_bad_row="]),
        ("dpo-sample pairs=", ["pairs=verified", "pairs=best_worst", "pairs=null"]),
        ("dpo-eval mode=t", ["mode=task"]),
        ("dpo-eval los", []),
        ("dpo-export --st", ["--step"]),
        ("dpo-export --d", ["--dtype"]),
        ("dpo-chat beside=", []),
        ("dpo-chat model=qwen2-7", ["model=qwen2-7b"]),
        ("dpo-report --v", ["--version"]),
    ],
)
def test_values_are_those_that_can_be_meant(line: str, offered: list[str]) -> None:
    assert candidates(line.split()[0], line) == offered


def test_ones_own_choices_are_offered(folder: Path) -> None:
    (folder / "conf/loss").mkdir(parents=True)
    (folder / "conf/loss/mine.yaml").write_text("_target_: mine.loss\n_partial_: true\n# How much.\ntau: 1\n")
    assert candidates("dpo-train", "dpo-train --config-dir conf loss=mi") == ["loss=mine", "loss=mix"]
    assert candidates("dpo-train", "dpo-train --config-dir conf loss=mine loss.") == ["loss.tau="]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_a_real_bash_completes_the_word_behind_the_equals_sign(folder: Path) -> None:
    script = folder / "press_tab.sh"
    script.write_text(_PRESS_TAB.format(python=sys.executable))
    pressed = subprocess.run(
        ["bash", "--norc", script, "dpo-train loss=kt"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert (pressed.stdout, pressed.stderr) == ("kto\n", "")


def test_what_is_no_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bsh"]) == 2
    assert "did you mean bash?" in capsys.readouterr().err


def test_an_answer_imports_nothing_heavy() -> None:
    script = (
        "import sys, dpo_cli.cli.completion as c; c.candidates('dpo-train', 'dpo-train model.dtype=');"
        "print(set(sys.modules) & {'torch', 'transformers', 'hydra', 'omegaconf', 'numpy'})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
