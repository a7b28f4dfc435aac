"""What README.md and docs/ say is so: every command, every row of data, every metric, every message that is quoted.

Commands in `sh` blocks are checked in this process: that a configuration composes and passes every check, that options
are known, that scripts, targets and extras are there. Pages in EXECUTED are run from top to bottom by the slow test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dpo_cli.cli import chat, convert_config, data, export, report, sample, train
from dpo_cli.cli import eval as evaluate
from dpo_cli.cli.arguments import parse_arguments
from dpo_cli.cli.run_folder import create_run_folder
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.compose.overrides import expand_sweep, parse_overrides
from dpo_cli.config.shipped import choices
from dpo_cli.data.formats import FORMATS, detect_format

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run as they stand: they need neither a GPU nor a network.
EXECUTED = ("first_run.md", "data.md", "result.md", "migrating.md")
# Of those, what cannot be run, and why.
NOT_EXECUTED = {
    "make train": "sets up a virtual environment from the network",
    "export PATH=": "of that environment",
    "--push": "would send a model to the hub; tests/end_to_end/test_export.py goes as far as its refusal",
}
# Commands of other programs, which are there or not: nothing of ours to check.
NOT_OURS = ("export ", "eval ", "hf auth login", "cat ")
# Ours, and beyond what can be checked here, and why.
UNCHECKED = {
    "_sweep sweep.": "goes on with a sweep as well",
    "resume=outputs/seeds": "goes on with a sweep, which the command before it would have to run",
    "interval(": "its values are drawn while the sweep goes on",
}
MAINS = {
    "dpo-train": train.main,
    "dpo-sample": sample.main,
    "dpo-eval": evaluate.main,
    "dpo-data": data.main,
    "dpo-chat": chat.main,
}
LAUNCHERS = ("torchrun", "deepspeed", "srun")


class Command(NamedTuple):
    page: str
    line: str

    @property
    def words(self) -> list[str]:
        # An ellipsis stands for what a reader would add.
        words = [word for word in shlex.split(self.line, comments=True) if word != "..."]
        # Variables set for this command alone come before its name.
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return words


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[Command]:
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if shlex.split(line, comments=True):
                found.append(Command(page.name, line.strip()))
    return found


ALL = [command for page in PAGES for command in commands(page)]


def make_workplace(folder: Path) -> None:
    """The files and folders that the pages speak of."""
    for name in ("my-model", "M", "my_conf", "outputs"):
        (folder / name).mkdir()
    pair = '{"prompt": "1+1?", "chosen": "2", "rejected": "3", "question": "1+1?", "best": "2", "answer": "2"}\n'
    for name in ("pairs", "more", "heldout", "truths", "questions", "test", "gsm8k", "answers", "ranked"):
        (folder / f"{name}.jsonl").write_text(pair)
    for name in ("more", "b"):
        (folder / f"{name}.parquet").touch()
    (folder / "any.json").write_text(f"[{pair}]")
    for name in ("a", "b"):
        (folder / f"{name}.json").write_text("{}")
        (folder / f"{name}.jsonl").write_text(pair)
    (folder / "my_conf" / "my_run.yaml").write_text("defaults: [config, _self_]\n")
    (folder / "my_conf" / "loss").mkdir()
    readme, losses = ROOT / "README.md", ROOT / "docs" / "losses.md"
    for page, name, module in ((readme, "mine", "my_losses"), (losses, "tilted", "my_tilted_losses")):
        python, yaml = next(blocks(page, "python")), next(blocks(page, "yaml"))
        (folder / f"{module}.py").write_text(python)
        text = yaml.replace("my_losses.", f"{module}.")
        (folder / "my_conf" / "loss" / f"{name}.yaml").write_text(text)
    for name in ("2026-01-31_12-00-00", "RUN", "first"):
        request = Request((f"run_dir={folder}/outputs/{name}",))
        (create_run_folder(check(compose(request)), request) / "final").mkdir()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    make_workplace(folder)
    return folder


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 60
    assert {command.page for command in ALL} >= {"README.md", "first_run.md", "data.md", "distributed.md"}


@pytest.mark.parametrize("page", sorted({command.page for command in ALL}))
def test_every_command_would_do(
    page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for command in [command for command in ALL if command.page == page]:
        _check(command, capsys)


def _check(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = command.words
    if command.line.startswith(NOT_OURS) and "| dpo-" not in command.line:
        return
    if any(part in command.line for part in UNCHECKED):
        return
    if "|" in words:
        ours = [part.strip() for part in command.line.partition(" #")[0].split("|") if part.strip().startswith("dpo-")]
        for part in ours:
            _check(Command(command.page, part), capsys)
    elif name in MAINS:
        refused = "# refused" in command.line
        assert _configures(name, words, capsys) != refused, command
    elif name == "dpo-report":
        report._read(words)
    elif name == "dpo-export":
        export._parser().parse_args(words)
    elif name == "dpo-convert-config":
        convert_config._parser().parse_args(words)
    elif name in LAUNCHERS:
        inside = command.line.partition("-m dpo_cli")[2] or command.line.partition("--module dpo_cli")[2]
        assert _configures("dpo-train", Command(command.page, inside.rstrip("'")).words, capsys), command
    elif name == "python":
        script, options = ROOT / words[0], [word for word in words[1:] if word.startswith("--")]
        assert script.is_file(), command
        near = "".join(file.read_text() for file in script.parent.glob("*.py"))
        assert all(f'"{option}"' in near for option in options), command
    elif name == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), command
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", command.line)), command
    else:
        pytest.fail(f"nobody checks {command}")


def _configures(name: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> bool:
    if {"--help", "--version", "--completion"} & set(words):
        return MAINS[name](words) == 0
    if "-m" in words:
        arguments = parse_arguments(words)
        overrides, problems = parse_overrides(arguments.overrides, sweep=True)
        jobs = expand_sweep(overrides)
        assert len(jobs) > 1
        for job in jobs:
            check(compose(Request(tuple(job), arguments.config_dir, arguments.config_name or "config")))
        return not problems
    # What a command would write must not be there yet, and another command on the page reads it.
    shown = [word.replace("out=", "out=new_") for word in words if word not in ("--cfg", "job")]
    code = MAINS[name]([*shown, "--cfg", "job"])
    said = capsys.readouterr().err
    assert code in (0, 2), said
    if "which is not installed" in said:  # an extra: the configuration was read as far as there
        return True
    assert code == 0 or "did you mean" in said, f"{name} {words}: {said}"
    return code == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    """In a folder with the embedded example's model and pairs under the names that the page uses."""
    from dpo_cli.paths import resolve_path

    base, example = tmp_path / "my-model", Path(resolve_path("dpo_cli://example"))
    subprocess.run(["cp", "-r", example / "base", base], check=True)
    rows = (example / "pairs.jsonl").read_text().splitlines(keepends=True)[:400]
    (tmp_path / "heldout.jsonl").write_text("".join(rows[:40]))
    named = [
        json.loads(row) | {"question": json.loads(row)["prompt"], "best": json.loads(row)["chosen"]} for row in rows
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    (tmp_path / "any.json").write_text(json.dumps(named))
    (tmp_path / "question.txt").write_text("Emma has 3 eggs. Emma gets 4 more. How many eggs does Emma have now?\n")
    (tmp_path / "dpo.yaml").write_text("model_name_or_path: ./my-model\nstage: dpo\nmax_steps: 2\ndataset: mine\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"mine": {"file_name": "../pairs.jsonl"}}')
    (tmp_path / "my_conf").mkdir()
    _run("dpo-data convert data.train=any.json out=more.parquet", tmp_path)
    if page == "result.md":
        settings = "model=local model.path=my-model data=local data.train=pairs.jsonl model.lora.rank=4"
        _run(f"dpo-train run_dir=outputs/RUN {settings} global_pairs=8 epochs=null max_steps=50", tmp_path)
    for command in [command for command in ALL if command.page == page]:
        if any(part in command.line for part in NOT_EXECUTED):
            continue
        line, _, remark = command.line.partition(" #")
        if line.startswith("dpo-train") and "run_dir=" not in line and "resume=" not in line:
            # A page that trains for long shows how; a few steps show that it does.
            line += " hardware=single_gpu optimizer.warmup_steps=0 max_steps=5"
        if line.startswith("dpo-export"):
            subprocess.run(["rm", "-rf", tmp_path / "exported"], check=True)
        _run(line, tmp_path, refused=remark.strip() == "refused")


def _run(line: str, folder: Path, *, refused: bool = False) -> None:
    """In a shell, with every command of this checkout under its own name."""
    programs = folder / ".bin"
    if not programs.exists():
        programs.mkdir()
        for name, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {target.partition(":")[0]} "$@"\n')
            program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DPO_STORE_DIR": str(folder / ".store"),
    }
    done = subprocess.run(
        line,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    # A conversation without a terminal has no question.
    wanted = 2 if refused or "Nothing came from standard input" in done.stderr else 0
    assert done.returncode == wanted, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_every_format_has_a_row_that_is_read_as_it() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    shown = re.findall(r"^### (.+?)\n(.*?)^```json\n(.*?)^```", text, re.M | re.S)
    assert [name for name, _, _ in shown] != []
    assert {name for name, _, _ in shown} == {known.name for known in FORMATS}
    for name, _, block in shown:
        for line in block.splitlines():
            row = json.loads(line)
            found = detect_format([row], mapped=frozenset(), prompt_template=None, where="docs/data.md")
            assert found.name == name
            read = found.read(row, None)
            assert read.prompt
            assert len(read.responses) == len(row.get("responses", [])) or (
                len(read.responses) == (2 if found.content == "preferences" else 1)
            )


def test_every_message_that_troubleshooting_quotes_is_one() -> None:
    said = "".join(file.read_text() for file in (ROOT / "dpo_cli").rglob("*.py"))
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [cell for line in text.splitlines() if line.startswith("| `") for cell in [line.split("`")[1]]]
    assert len(quoted) > 20
    assert not [message for message in quoted if message not in said and "/" not in message]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if page.name not in index and page.name != "README.md"]


def test_choosing_a_loss_speaks_of_every_loss() -> None:
    text = (ROOT / "docs" / "choosing_a_loss.md").read_text().partition("## What each optimises")[2]
    assert not [loss for loss in choices("loss") if f"`{loss}`" not in text.partition("## Choosing beta")[0]]
