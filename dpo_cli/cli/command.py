"""What dpo-sample and dpo-eval have in common: check the command line, find a place to work, compute, clear up."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.cli.answers import answer
from dpo_cli.cli.arguments import Arguments, parse_arguments
from dpo_cli.cli.heavy_imports import heavy_imports
from dpo_cli.cli.train import exit_code_of, show_settings
from dpo_cli.engine.environment import is_worker, stop_seconds
from dpo_cli.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from dpo_cli.config.check import Rules
    from dpo_cli.config.commands import CommandConfig
    from dpo_cli.engine.ranks import Ranks

# What a work folder holds beside finished responses: what is to be done there.
SETTINGS_FILE = "command.yaml"
_PARTIAL = ".partial"
OPTIONS = """
Options
  --cfg job           show the configuration instead of {doing}
  --config-dir DIR    look for configuration files in DIR as well
  --config-name NAME  start from NAME.yaml of that folder, whose defaults list begins with `{config_name}`
  --completion SHELL  print what makes bash, zsh or fish complete groups, choices and keys
  --version, --help

Groups: choose with GROUP=CHOICE; show=GROUP tells what each choice is
"""
_EXIT_CODES = """
Exit codes: 0 done, 2 bad input (nothing was written), 75 stopped by a signal after keeping what was finished (give the
same command again), 130 stopped at once.
"""


@dataclass(frozen=True)
class Command:
    """name: as it is called. config_name: of its file in conf/. doing, introduction: what its help says it does."""

    name: str
    config_name: str
    doing: str
    introduction: str

    def rules(self) -> Rules[Any]:
        from dpo_cli.config.command_checks import EVAL, SAMPLE

        return SAMPLE if self.config_name == "sample" else EVAL

    def run(self, config: Any, work: Path, *, ranks: Ranks | None = None) -> None:
        """Compute, in this process or as one of `ranks`. Only here is torch imported."""
        if self.config_name == "sample":
            with heavy_imports(deepspeed=ranks is not None):
                from dpo_cli.evaluation.sample import run_sample

            run_sample(config, work, ranks=ranks)
            return
        with heavy_imports(deepspeed=ranks is not None):
            from dpo_cli.evaluation.evaluate import run_eval

        run_eval(config, work, ranks=ranks)


def main_of(command: Command, argv: Sequence[str] | None) -> int:
    """Run a command with these arguments, those of the process by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(command, words), program=command.name)


def _dispatch(command: Command, words: list[str]) -> None:
    arguments = parse_arguments(words, program=command.name)
    from dpo_cli.config.shipped import COMMAND_GROUPS

    told = answer(
        arguments,
        program=command.name,
        groups=COMMAND_GROUPS,
        config=command.config_name,
        every_key=partial(_help, command),
    )
    if told is not None:
        print(told, end="")
        return
    config = _checked(command, arguments)
    if arguments.show_config:
        show_settings(config.as_dict())
        return
    if is_worker():
        raise ConfigError(
            f"{command.name} starts its processes by itself, and a launcher has started this one.",
            where="RANK and WORLD_SIZE",
            hint=f"{command.name} hardware=deepspeed_zero1 hardware.num_workers=N, without a launcher",
        )
    with _work_folder(config.out) as work:
        _compute(command, config, work)


def _help(command: Command) -> str:
    from dpo_cli.cli.help import page
    from dpo_cli.config.shipped import COMMAND_GROUPS

    files = [
        (f"{command.config_name}.yaml", ""),
        ("model/_base.yaml", "model"),
        ("hardware/single_gpu.yaml", "hardware"),
    ]
    head = command.introduction + OPTIONS.format(doing=command.doing, config_name=command.config_name)
    return page(head, COMMAND_GROUPS, files, _EXIT_CODES)


def _checked(command: Command, arguments: Arguments) -> CommandConfig:
    from dpo_cli.config.check import check_by
    from dpo_cli.config.compose.composition import Request, compose
    from dpo_cli.config.loss_signature import import_path_includes
    from dpo_cli.config.shipped import COMMAND_GROUPS

    if arguments.sweep or arguments.resume is not None:
        raise ConfigError(
            f"{command.name} does one thing at a time: there is no -m and no resume=.",
            where="command line",
            hint="the same command given again goes on where it was stopped",
        )
    # A user's own verifier lies where the command is started.
    import_path_includes(Path.cwd())
    request = Request(
        arguments.overrides,
        arguments.config_dir,
        arguments.config_name or command.config_name,
        groups=COMMAND_GROUPS,
        program=command.name,
    )
    config: CommandConfig = check_by(command.rules(), compose(request))
    return config


@contextmanager
def _work_folder(out: str | None) -> Iterator[Path]:
    """A folder beside the file to write, or a passing one; removed where nothing in it is worth keeping."""
    from dpo_cli.cli.run_folder import exclusive

    if out is None:
        with tempfile.TemporaryDirectory(prefix="dpo-eval-") as passing:
            yield Path(passing)
        return
    folder = Path(f"{out}{_PARTIAL}")
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder, doing="working for this file"):
        try:
            yield folder
        finally:
            # Only whoever holds the folder may clear it away.
            if Path(out).exists() or not list(folder.glob("*/part-*.jsonl")):
                shutil.rmtree(folder, ignore_errors=True)


def _compute(command: Command, config: CommandConfig, work: Path) -> None:
    """In this process, or in workers that it starts and waits for."""
    if not config.hardware.is_distributed:
        command.run(config, work)
        return
    import yaml

    from dpo_cli.engine.launch import launch, workers_on

    settings = {"command": command.config_name, "settings": config.as_dict()}
    (work / SETTINGS_FILE).write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
    workers = workers_on(config.hardware.device, wanted=config.hardware.num_workers)
    words = [sys.executable, "-P", "-u", "-m", "dpo_cli.cli.command_worker", str(work)]
    try:
        launch(words, workers=workers, run_dir=work, stop_seconds=stop_seconds())
    except Interrupted as stopped:
        stopped.hint = stopped.hint or "give the same command again"
        raise
