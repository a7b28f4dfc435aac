"""dpo-data: check a data set as training would read it, without a model's weights; or write it in one form."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.cli.answers import answer
from dpo_cli.cli.arguments import Arguments, parse_arguments
from dpo_cli.cli.command import OPTIONS
from dpo_cli.cli.heavy_imports import heavy_imports
from dpo_cli.cli.train import exit_code_of, show_settings
from dpo_cli.errors import ConfigError

if TYPE_CHECKING:
    from dpo_cli.config.check import Rules

_PROGRAM = "dpo-data"
_INTRODUCTION = """\
dpo-data: what training would make of a data set, without a model's weights and without a GPU.

  dpo-data model=qwen2-7b data=hh_rlhf                       every key of dpo-train means the same here
  dpo-data model=local model.path=my-model data=local data.train=pairs.jsonl data.eval=heldout.jsonl out=found.json
  dpo-data ... fail_on=[contradictions,overlap,near_overlap] what ends it with exit code 1, for CI
  dpo-data convert data.train=any.json out=pairs.parquet     the same rows in one form; needs no model

Of the model only the tokenizer and config.json are read. Tokenised data stay in the store, so training starts at once.
"""
_EXIT_CODES = """
Exit codes: 0 nothing found that fail_on names, 1 something found, 2 bad input (unreadable, or nothing left to train
on), 130 stopped at once.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-data with these arguments, those of the process by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(words), program=_PROGRAM)


def _dispatch(words: list[str]) -> None:
    converts = words[:1] == ["convert"]
    arguments = parse_arguments(words[1:] if converts or words[:1] == ["check"] else words, program=_PROGRAM)
    from dpo_cli.config.shipped import GROUPS

    groups, config = (("data",), "convert") if converts else (GROUPS, "config")
    every_key = partial(_help, converts=converts)
    told = answer(arguments, program=_PROGRAM, groups=groups, config=config, every_key=every_key)
    if told is not None:
        print(told, end="")
    elif converts:
        _convert(arguments)
    else:
        _check(arguments)


def _help(*, converts: bool) -> str:
    from dpo_cli.cli.help import page
    from dpo_cli.config.shipped import GROUPS

    if converts:
        options = OPTIONS.format(doing="converting", config_name="convert")
        return page(_INTRODUCTION + options, ("data",), [("convert.yaml", ""), ("data/_base.yaml", "data")], "")
    options = OPTIONS.format(doing="checking", config_name="check")
    files = [("check.yaml", ""), ("data/_base.yaml", "data"), ("model/_base.yaml", "model")]
    return page(_INTRODUCTION + options, GROUPS, files, "  ... and every other key of dpo-train.\n" + _EXIT_CODES)


def _check(arguments: Arguments) -> None:
    from dpo_cli.config.command_checks import DATA_CHECK

    config = _checked(arguments, DATA_CHECK, "check")
    if arguments.show_config:
        show_settings(config.as_dict())
        return
    # Only here, with the configuration checked, is torch imported.
    with heavy_imports(deepspeed=False):
        from dpo_cli.inspection.check import check_data

    check_data(config)


def _convert(arguments: Arguments) -> None:
    from dpo_cli.config.command_checks import CONVERT

    config = _checked(arguments, CONVERT, "convert")
    if arguments.show_config:
        show_settings(config.as_dict())
        return
    from dpo_cli.data.convert import convert

    written = convert(config.data, Path(config.out))
    print("\n".join(written.lines()))


def _checked(arguments: Arguments, rules: Rules[Any], config_name: str) -> Any:
    from dpo_cli.config.check import check_by
    from dpo_cli.config.compose.composition import Request, compose
    from dpo_cli.config.loss_signature import import_path_includes

    if arguments.sweep or arguments.resume is not None:
        raise ConfigError(f"{_PROGRAM} looks at one data set: there is no -m and no resume=.", where="command line")
    # A user's own loss lies where the command is started.
    import_path_includes(Path.cwd())
    request = Request(
        arguments.overrides,
        arguments.config_dir,
        arguments.config_name or config_name,
        groups=rules.groups,
        program=_PROGRAM,
    )
    return check_by(rules, compose(request))


if __name__ == "__main__":
    raise SystemExit(main())
