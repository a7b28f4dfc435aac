"""`show=loss`: what there is to choose from, and what each choice is, from the first sentence of its file."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dpo_cli.cli.help import keys_of
from dpo_cli.config.shipped import CONF_FOLDER, choices, default_choices, description, file_of
from dpo_cli.config.suggest import suggest_choice
from dpo_cli.errors import ConfigError

_DECIDES = {
    "model": "the policy at its start: weights, dtype, adapters",
    "data": "what is learnt from, and how rows become tokens",
    "loss": "how preferences become a gradient (docs/losses.md)",
    "optimizer": "how the weights move: learning rate, schedule, clipping",
    "hardware": "one device or many, and how the model is spread over them (docs/distributed.md)",
    "logger": "who is told of metrics beside metrics.jsonl and the screen: logger=[tensorboard] or logger=[]",
    "recipe": "all of the above at once: a whole experiment",
}
# What is chosen by something else that was chosen.
_BROUGHT = {"data": "; model=tiny brings data=arithmetic along"}
_KEYS = "keys"


def show(
    name: str, *, program: str, groups: Sequence[str], config: str, own: Path | None, every_key: Callable[[], str]
) -> str:
    """What `show=NAME` asks for.

    config: the file of conf/ that the command starts from. own: a folder of the user's with more choices. every_key:
    the page with every key.
    Raises ConfigError for what is neither a group nor a choice.
    """
    name = name.strip().strip("/")
    if name in ("", "groups"):
        lines = _table((group, _DECIDES[group]) for group in groups)
        listed = f"show=GROUP lists its choices, show=GROUP/CHOICE the keys of one, show={_KEYS} every key."
        return "\n".join([f"Groups of {program}: choose with GROUP=CHOICE", *lines, listed]) + "\n"
    if name == _KEYS:
        return every_key()
    group, *rest = re.split("[/=.]", name, maxsplit=1)
    choice = "".join(rest)
    if group not in groups:
        raise ConfigError(
            f"There is no group {group}.", where="show", hint=suggest_choice(group, (*groups, "groups", _KEYS))
        )
    names = choices(group, *([own] if own is not None else []))
    if not choice:
        default = default_choices(CONF_FOLDER / f"{config}.yaml").get(group)
        lines = _table(
            (f"{each} *" if each == default else each, description(_file(group, each, own)) or "no word of it")
            for each in names
        )
        told = [f"* the default{_BROUGHT.get(group, '')}"] if default in names else []
        return "\n".join([f"{group}: {_DECIDES[group]}", *lines, *told]) + "\n"
    if choice not in names:
        raise ConfigError(f"There is no {group} {choice}.", where="show", hint=suggest_choice(choice, names))
    file = _file(group, choice, own)
    return "\n".join([f"{group}={choice}: {description(file)}", *keys_of(file, group)]) + "\n"


def _file(group: str, choice: str, own: Path | None) -> Path:
    theirs = own / group / f"{choice}.yaml" if own is not None else None
    return theirs if theirs is not None and theirs.exists() else file_of(group, choice)


def _table(rows: Iterator[tuple[str, str]]) -> list[str]:
    """Two columns; on a terminal wrapped to its width, elsewhere one line each, for grep."""
    listed = list(rows)
    column = max(len(name) for name, _ in listed) + 2
    width = max(60, shutil.get_terminal_size().columns - 1) if sys.stdout.isatty() else 10_000
    return [
        textwrap.fill(f"  {name:<{column}}{told}", width, subsequent_indent=" " * (column + 2)) for name, told in listed
    ]
