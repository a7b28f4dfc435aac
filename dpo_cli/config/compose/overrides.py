"""Read `key=value` words of a command line, all of them, bad ones included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString, ValueType
from hydra.errors import HydraException

from dpo_cli.config.secrets import mask
from dpo_cli.config.shipped import GROUPS
from dpo_cli.errors import ConfigError, DpoError

# Keys whose value is text to be taken as it stands: braces, commas and trailing spaces mean nothing to Hydra in them.
# Escapes such as \n are decoded where the template is used, so that a YAML file may hold them as well.
VERBATIM_KEYS = frozenset({"data.prompt_template", "eval.task.prompt_template", "prompt_template", "prompt", "system"})

_BARE_WORDS = {
    "help": "--help",
    "version": "--version",
    "show": "show=loss, or another group; show= tells all groups",
    "completion": "--completion bash",
}


def parse_overrides(
    words: Sequence[str], *, sweep: bool, program: str = "dpo-train"
) -> tuple[list[Override], list[DpoError]]:
    """Overrides in order, and a problem for every word that is none.

    sweep: several values for a key, as in loss.beta=0.1,0.5, are allowed, and so are intervals, which only a search can
        draw from. program: whose command line it is.
    """
    # Without a config loader: it is needed for glob() sweeps over a group's choices only, which are refused below.
    parser = OverridesParser.create()
    overrides: list[Override] = []
    problems: list[DpoError] = []
    for word in _without_lone_equals(words, problems):
        try:
            override = _parse(word, parser)
        except ConfigError as error:
            problems.append(error)
            continue
        if override.is_sweep_override() and (problem := _sweep_problem(override, sweep, program)):
            problems.append(problem)
        else:
            overrides.append(override)
    return overrides, problems


def expand_sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """The override words of every job: the product of all values given, the last key varying fastest."""
    axes = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in overrides
    ]
    return [list(job) for job in itertools.product(*axes)]


def _without_lone_equals(words: Sequence[str], problems: list[DpoError]) -> list[str]:
    """The words, without those of `key = value`, which are a problem of their own."""
    kept = list(words)
    while "=" in kept:
        at = kept.index("=")
        told = kept[max(0, at - 1) : at + 2]
        problems.append(
            ConfigError(
                f"{mask(' '.join(told))!r} has spaces around its equals sign.",
                where="command line",
                hint=mask("".join(told)),
            )
        )
        del kept[max(0, at - 1) : at + 2]
    return kept


def _parse(word: str, parser: OverridesParser) -> Override:
    key, equals, value = word.partition("=")
    key = key.strip()
    if key.lstrip("+") in VERBATIM_KEYS and equals and value != "null":
        return _verbatim(word, key.lstrip("+"), value)
    if word.startswith("-"):
        raise ConfigError(f"There is no option {word}.", where="command line", hint=_without_dashes(word))
    if not equals and not word.startswith("~"):
        raise ConfigError(
            f"{mask(word)!r} is not of the form key=value.",
            where="command line",
            hint=_BARE_WORDS.get(word)
            or (f"{word}=NAME; show={word} lists the names" if word in GROUPS else None)
            or "write key=value, without spaces around the equals sign; quote values that hold spaces",
        )
    try:
        return parser.parse_override(word)
    except HydraException:
        # The parser's own words speak of tokens and alternatives.
        raise ConfigError(
            f"{mask(word)!r} cannot be read: a bracket, brace, comma or quote in it lacks its fellow or its quotes.",
            where="command line",
            hint=f"quote text twice, for the shell and for the reader: '{key}=\"...\"'",
        ) from None


def _verbatim(word: str, key: str, value: str) -> Override:
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return Override(
        type=OverrideType.CHANGE,
        key_or_group=key,
        value_type=ValueType.ELEMENT,
        _value=QuotedString(text=value, quote=Quote.double),
        input_line=word,
    )


def _sweep_problem(override: Override, sweep: bool, program: str) -> ConfigError | None:
    word = mask(str(override.input_line))
    key = override.key_or_group
    if not sweep:
        values = word.partition("=")[2]
        sweeping = f"dpo-train -m {word} trains one after the other; " if program == "dpo-train" else ""
        return ConfigError(
            f"{word} gives {key} several values.",
            where="command line",
            hint=f"{sweeping}{key}=[{values}] is one list",
        )
    if key in ("run_dir", "resume"):
        return ConfigError(
            f"{key} cannot be swept: a sweep numbers its jobs' folders itself.",
            where="command line",
            hint="run_dir=FOLDER puts them at FOLDER/0, FOLDER/1, ...",
        )
    if key.partition(".")[0] == "sweep":
        return ConfigError(f"{key} says how to sweep, and has one value.", where="command line", hint=f"{key}=VALUE")
    if override.is_interval_sweep():
        return None
    try:
        if not list(override.sweep_string_iterator()):
            return ConfigError(f"{word} gives {key} no value.", where="command line")
    except HydraException:
        return ConfigError(
            f"{word} cannot be swept: its values must be listed.",
            where="command line",
            hint=f"{key}=value1,value2 or {key}=range(1,4)",
        )
    return None


def intervals_are_for_searches(overrides: Sequence[Override]) -> list[DpoError]:
    """A problem for every interval: a grid has no end of its values."""
    return [
        ConfigError(
            f"{mask(str(override.input_line))} has no list of values to train with.",
            where="command line",
            hint=f"{override.key_or_group}=value1,value2; or sweep.sampler=tpe sweep.trials=20, which searches it",
        )
        for override in overrides
        if override.is_interval_sweep()
    ]


def _without_dashes(word: str) -> str:
    bare = word.lstrip("-").replace("-", "_")
    return f"{bare} (keys have no dashes)" if "=" in bare else "--help lists the options"
