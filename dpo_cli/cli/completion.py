"""Completion in the shell: `eval "$(dpo-train --completion bash)"`; groups, their choices, keys, and values of a few.

The shell asks `python -m dpo_cli.cli.completion PROGRAM LINE` for what could stand at the line's end. What is answered
comes from the YAML files as they are; Hydra's own completion takes a second and knows one program only.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dpo_cli.config.shipped import COMMAND_GROUPS, CONF_FOLDER, GROUPS, choices, default_choices, documented_keys
from dpo_cli.config.suggest import suggest_choice
from dpo_cli.errors import ConfigError

_BASH = """\
_dpo_cli() {
    local line=${COMP_LINE:0:COMP_POINT} typed prefix=
    typed=${line##*[[:space:]]}
    # What the shell takes for the word begins after the equals sign.
    [[ $COMP_WORDBREAKS == *=* ]] && prefix=${typed%"${typed##*=}"}
    mapfile -t COMPREPLY < <(PYTHON -P -m dpo_cli.cli.completion "${1##*/}" "$line" 2>/dev/null)
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    [[ ${COMPREPLY[0]-} == *[=.] ]] && compopt -o nospace
}
complete -o default -F _dpo_cli PROGRAMS
"""
_ZSH = """\
_dpo_cli() {
    local -a found open whole
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    found=(${(f)"$(PYTHON -P -m dpo_cli.cli.completion ${words[1]:t} $line 2>/dev/null)"})
    open=(${(M)found:#*[=.]}) whole=(${found:#*[=.]})
    (( $#open )) && compadd -S '' -- $open
    (( $#whole )) && compadd -- $whole
    (( $#found )) || { compset -P '*='; _files }
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _dpo_cli PROGRAMS
"""
_FISH = """\
function _dpo_cli
    PYTHON -P -m dpo_cli.cli.completion $argv[1] (commandline -cp | string collect) 2>/dev/null
end
for program in PROGRAMS
    complete -c $program -a "(_dpo_cli $program)"
end
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_OPTIONS = ("--help", "--version", "--completion", "--cfg", "--config-dir", "--config-name")
# What may follow an option; nothing: names of files, which the shell knows.
_FOLLOWING = {"--completion": tuple(_SCRIPTS), "--cfg": ("job",), "-c": ("job",)}


@dataclass(frozen=True)
class _Program:
    """config: the file of conf/ it starts from. keys: files with keys, and the section they are keys of."""

    config: str
    groups: tuple[str, ...]
    keys: tuple[tuple[str, str], ...]
    options: tuple[str, ...] = _OPTIONS
    first: tuple[str, ...] = ()


_TRAINING_KEYS = (("config", ""), ("data/_base", "data"))
_PROGRAMS = {
    "dpo-train": _Program("config", GROUPS, _TRAINING_KEYS, (*_OPTIONS, "--help-all", "--multirun")),
    "dpo-data": _Program("config", GROUPS, (("check", ""), *_TRAINING_KEYS), first=("check", "convert")),
    "dpo-data convert": _Program("convert", ("data",), (("convert", ""), ("data/_base", "data"))),
    "dpo-sample": _Program("sample", COMMAND_GROUPS, (("sample", ""),)),
    "dpo-eval": _Program("eval", COMMAND_GROUPS, (("eval", ""),)),
    "dpo-chat": _Program("chat", ("model",), (("chat", ""),)),
    "dpo-export": _Program(
        "",
        (),
        (),
        ("--help", "--to", "--step", "--merge", "--adapter-only", "--dtype", "--max-shard-size", "--push", "--public"),
    ),
    "dpo-report": _Program("", (), (), ("--help", "--version")),
    "dpo-convert-config": _Program("", (), (), ("--help", "--to", "--gpus")),
}


def script(shell: str) -> str:
    """What a shell is to evaluate. Raises ConfigError for one that is not known."""
    if shell not in _SCRIPTS:
        raise ConfigError(
            f"There is no completion for {shell or 'no shell'}.",
            where="--completion",
            hint=suggest_choice(shell, _SCRIPTS),
        )
    programs = " ".join(name for name in _PROGRAMS if " " not in name)
    return _SCRIPTS[shell].replace("PYTHON", shlex.quote(sys.executable)).replace("PROGRAMS", programs)


def candidates(program: str, line: str) -> list[str]:
    """Words that could stand at the end of what is typed so far; "=" or "." at their end ask for more."""
    *before, current = _words(line)
    while before and Path(before[0]).name != program:
        before.pop(0)
    before = before[1:]
    if program == "dpo-data" and before[:1] == ["convert"]:
        program = "dpo-data convert"
    known = _PROGRAMS.get(program)
    if known is None:
        return []
    last = before[-1] if before else ""
    if last in _FOLLOWING:
        found: Iterable[str] = _FOLLOWING[last]
    elif last in ("--config-dir", "-cd", "--config-name", "-cn"):
        found = ()
    elif current.startswith("-"):
        found = known.options
    elif "=" in current:
        key = current.partition("=")[0]
        found = (f"{key}={value}" for value in _values(key.lstrip("+"), known, before))
    else:
        keys = (_up_to_a_section(key, current) for key in _keys(known, before))
        found = dict.fromkeys([*(() if before else known.first), *keys])
    return [word for word in found if word.startswith(current)]


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line)
    except ValueError:  # a quote that is still open
        words = line.split()
    return [*words, ""] if not words or line[-1:].isspace() else words


def _up_to_a_section(key: str, typed: str) -> str:
    """`model.` for all keys in it until that is typed."""
    begun = len(typed.rpartition(".")[0])
    dot = key.find(".", begun + 1 if begun else 0)
    return key[: dot + 1] if dot >= 0 else key


def _keys(program: _Program, before: Sequence[str]) -> Iterator[str]:
    if program.config:
        yield from (f"{name}=" for name in (*program.groups, "show"))
    for file, section in _files(program, before):
        yield from (f"{key.name}=" for key in documented_keys(file, section) if key.default)


def _files(program: _Program, before: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Those that hold the keys, with the section each is of; of a group the choice that the line makes."""
    yield from ((CONF_FOLDER / f"{name}.yaml", section) for name, section in program.keys)
    chosen = default_choices(CONF_FOLDER / f"{program.config}.yaml") if program.config else {}
    chosen |= dict(word.split("=", 1) for word in before if word.partition("=")[0] in program.groups)
    for group in ("model", "loss", "optimizer", "hardware"):
        if group in program.groups:
            folders = [CONF_FOLDER / group, *(folder / group for folder in _own(before))]
            files = [folder / f"{name}.yaml" for folder in folders for name in ("_base", chosen.get(group, ""))]
            yield from ((file, group) for file in files if file.exists())


def _own(before: Sequence[str]) -> list[Path]:
    """The folder of --config-dir."""
    return [Path(value) for option, value in pairwise(before) if option in ("--config-dir", "-cd")]


def _values(key: str, program: _Program, before: Sequence[str]) -> list[str]:
    if key == "logger" and key in program.groups:
        return [*(f"[{name}]" for name in choices(key)), "[]"]
    if key in program.groups:
        return choices(key, *_own(before))
    if key == "show":
        return [*program.groups, "groups", "keys"]
    defaults: dict[str, str] = {}
    for file, section in _files(program, before):
        defaults |= {found.name: found.default for found in documented_keys(file, section) if found.default}
    if defaults.get(key) in ("true", "false"):
        return ["true", "false"]
    return _literals(key, program.config) if key in defaults else []


def _literals(key: str, config: str) -> list[str]:
    """The words that a key may be set to, where these are few."""
    from dpo_cli.config.commands import ChatConfig, ConvertConfig, EvalConfig, SampleConfig
    from dpo_cli.config.schema import OPTIMIZERS, Config, OptimizerBase

    schemas: dict[str, Any] = {"convert": ConvertConfig, "sample": SampleConfig, "eval": EvalConfig, "chat": ChatConfig}
    section, _, name = key.partition(".")
    kinds: list[Any] = [schemas.get(config, Config)]
    if section == "optimizer":
        kinds, key = [OptimizerBase, *OPTIMIZERS.values()], name
    for part in key.split("."):
        kinds = [
            inner
            for kind in kinds
            if part in getattr(kind, "model_fields", {})
            for inner in _parts(kind.model_fields[part].annotation)
        ]
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return [*dict.fromkeys(words), *(["null"] if words and type(None) in kinds else [])]


def _parts(annotation: Any) -> list[Any]:
    """What an annotation is made of, `X | None` and `Annotated[X, ...]` taken apart."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _parts(inner)]


if __name__ == "__main__":
    for word in candidates(sys.argv[1], sys.argv[2]):
        print(word)
