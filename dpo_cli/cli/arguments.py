"""The command line, as far as it is not override words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dpo_cli.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """overrides: key=value words, `resume=` and `show=` left out. A flag that was not given is False or None.

    show: what of the configuration files is to be listed; "" for all groups. completion: for which shell.
    """

    overrides: tuple[str, ...]
    resume: str | None
    config_dir: Path | None
    config_name: str | None
    sweep: bool
    show_config: bool
    help: bool
    help_all: bool
    version: bool
    show: str | None
    completion: str | None

    @property
    def shows_only(self) -> bool:
        """Whether something is to be told, and nothing done."""
        asked = self.help or self.help_all or self.version or self.show_config
        return asked or self.show is not None or self.completion is not None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"The command line cannot be read: {message}.", hint=f"{self.prog} --help")


def parse_arguments(words: Sequence[str], *, program: str = "dpo-train") -> Arguments:
    """Raises ConfigError for an option that is incomplete; unknown ones become override words, reported with those."""
    parser = _Parser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help-all", action="store_true")
    parser.add_argument("--completion", nargs="?", const="")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("--config-dir", "-cd", type=Path)
    parser.add_argument("--config-name", "-cn")
    # What argparse does not know keeps its place among the overrides only if argparse is not asked to sort them.
    options, overrides = parser.parse_known_args(list(words))
    shown = [word.partition("=")[2] for word in overrides if word.startswith("show=")]
    resumes = [word.partition("=")[2] for word in overrides if word.startswith("resume=")]
    if len(resumes) > 1:
        raise ConfigError("resume= is given twice.", where="command line")
    if options.cfg and options.multirun:
        raise ConfigError(
            "--cfg shows one job and -m runs several.", where="command line", hint="leave one of them out"
        )
    resume = resumes[0].strip("\"'") if resumes and resumes[0] != "null" else None
    if resume == "":
        raise ConfigError("resume= names no run folder.", where="command line", hint="resume=outputs/...")
    return Arguments(
        overrides=tuple(word for word in overrides if not word.startswith(("resume=", "show="))),
        resume=resume,
        config_dir=options.config_dir,
        config_name=options.config_name.removesuffix(".yaml") if options.config_name else None,
        sweep=options.multirun,
        show_config=options.cfg is not None,
        help=options.help,
        help_all=options.help_all,
        completion=options.completion,
        show=shown[-1] if shown else None,
        version=options.version,
    )
