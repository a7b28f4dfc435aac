"""dpo-convert-config: a configuration of TRL, LLaMA-Factory or axolotl as one that dpo-train reads."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dpo_cli.cli.train import exit_code_of
from dpo_cli.errors import ConfigError, DataProblems

_PROGRAM = "dpo-convert-config"


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-convert-config with these arguments, those of the process by default; returns the exit code."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _convert(arguments), program=_PROGRAM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Print the YAML for dpo-train that says what a configuration of TRL, LLaMA-Factory or axolotl "
        "says; its head lists what could not be carried over. Exit codes: 0 dpo-train accepts it, 1 it asks for more, "
        "2 the file is none of these.",
    )
    parser.add_argument("file", type=Path, help="what trl dpo --config, llamafactory-cli train or axolotl train reads")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write it there; must not exist yet")
    parser.add_argument("--gpus", type=int, default=1, help="on how many it was run, for pairs an optimiser step")
    return parser


def _convert(arguments: argparse.Namespace) -> None:
    from dpo_cli.config.foreign.convert import convert, read_foreign

    if arguments.gpus < 1:
        raise ConfigError("There is no run without a GPU or a CPU.", where="--gpus", hint="--gpus 1")
    settings = read_foreign(arguments.file)
    try:
        done = convert(settings, gpus=arguments.gpus, folder=arguments.file.parent)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # The file is another tool's, which alone knows every form that its values may have.
        raise ConfigError(
            f"A value in it is not of the kind its key has elsewhere: {error}.", where=str(arguments.file)
        ) from None
    text = done.text(arguments.file.name)
    if arguments.to is None:
        print(text, end="")
    else:
        try:
            with arguments.to.open("x", encoding="utf-8") as opened:
                opened.write(text)
        except FileExistsError:
            raise ConfigError(f"{arguments.to} is there already, and nothing is written over.", where="--to") from None
        print(text.partition("defaults:")[0], end="")
        print(f"dpo-train --config-dir {arguments.to.parent} --config-name {arguments.to.stem}")
    _check(text)


def _check(text: str) -> None:
    """Raises DataProblems telling what dpo-train would refuse."""
    from dpo_cli.cli.train import report
    from dpo_cli.config.check import check
    from dpo_cli.config.compose.composition import Request, compose

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "converted.yaml").write_text(text, encoding="utf-8")
        try:
            check(compose(Request(config_dir=Path(folder), config_name="converted")))
        except ConfigError as error:
            asked = report(error).replace(f"{folder}/", "")
            raise DataProblems(f"As it stands dpo-train would say:\n{asked}") from None


if __name__ == "__main__":
    raise SystemExit(main())
