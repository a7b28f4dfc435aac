"""From a composition to a checked configuration, or to everything that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpo_cli.config.compose.composition import Composition
from dpo_cli.config.contradictions import CHECKS, held_out_data_is_named_once
from dpo_cli.config.keys import known_keys
from dpo_cli.config.loss_check import check_loss
from dpo_cli.config.machine_checks import Check
from dpo_cli.config.schema import OPTIMIZERS, Config, Section
from dpo_cli.config.secrets import looks_secret, mask
from dpo_cli.config.shipped import GROUPS, is_shipped
from dpo_cli.config.suggest import suggest_choice, suggest_key
from dpo_cli.config.sweep_checks import SWEEP_CHECKS
from dpo_cli.errors import ConfigError, DpoError

MISSING = "???"
C = TypeVar("C", bound=Section)
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text, not nothing",
    "finite_number": "finite",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


@dataclass(frozen=True)
class Rules(Generic[C]):
    """What the configuration of a command must be.

    known_keys: the names of all keys, given the values. groups: what is chosen by files. checks: what the values must
    not say together. spared: keys that need not be given, given the values.
    """

    schema: type[C]
    known_keys: Callable[[Mapping[str, Any]], list[str]]
    groups: tuple[str, ...]
    checks: tuple[Check, ...]
    spared: Callable[[Mapping[str, Any]], frozenset[str]] = lambda values: frozenset()


def check(composition: Composition) -> Config:
    """The checked configuration of a training, which knows of no sweep. Raises ConfigError with every problem found."""
    return check_by(TRAINING, composition).model_copy(update={"sweep": None})


def check_by(rules: Rules[C], composition: Composition) -> C:
    """The checked configuration. Raises ConfigError holding every problem found."""
    problems = list(composition.problems)
    config: C | None = None
    if composition.values:
        config, found = _check_values(rules, composition)
        problems += found
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _check_values(rules: Rules[C], composition: Composition) -> tuple[C | None, list[DpoError]]:
    values = composition.values
    problems: list[DpoError] = []
    faulty: set[str] = set()

    flat = dict(flatten(values))
    spared = rules.spared(values)
    for key, value in flat.items():
        if value == MISSING and key in spared:
            faulty.add(key)
        elif value == MISSING:
            faulty.add(key)
            problems.append(_located(ConfigError(f"{key} must be given.", hint=f"{key}=..."), key, composition))
        elif looks_secret(key, value):
            faulty.add(key)
            problem = ConfigError(
                f"{key} seems to hold an access token or password ({mask(f'{key}={value}').partition('=')[2]}).",
                hint="log in, or set an environment variable, instead: a run's settings are saved beside its results",
            )
            problems.append(_located(problem, key, composition))

    config: C | None = None
    try:
        config = rules.schema.model_validate(values)
    except ValidationError as error:
        for key, problem in _schema_problems(error.errors(include_url=False), rules, composition):
            if key not in faulty:
                faulty.add(key)
                problems.append(problem)

    # Sections that are switched off pass the schema unread.
    known = set(rules.known_keys(values))
    for key in flat:
        if key.startswith(("model.lora.", "eval.task.")) and key not in known and key not in faulty:
            faulty.add(key)
            problems.append(_located(_unknown(key, rules, composition), key, composition))

    loss = values.get("loss")
    if isinstance(loss, Mapping) and "loss" in rules.groups:
        found = check_loss(
            {key: value for key, value in loss.items() if f"loss.{key}" not in faulty}, composition.place
        )
        faulty |= {str(problem.where).split(",")[0] for problem in found}
        problems += found

    valid = {key: value for key, value in flat.items() if not any(_under(key, bad) for bad in faulty)}
    # A single {path: ...} counts as one value, not as a section.
    data = values.get("data")
    for leaf in ("train", "eval", "generator"):
        if isinstance(data, Mapping) and leaf in data and f"data.{leaf}" not in faulty:
            valid[f"data.{leaf}"] = data[leaf]
    valid |= {f"choice.{group}": choice for group, choice in composition.choices.items()}
    checks = list(rules.checks)
    place = composition.place("data.eval_fraction")
    if "data" in rules.groups and place is not None and not is_shipped(place):
        checks.append((held_out_data_is_named_once, ("data.eval", "data.eval_fraction")))
    for contradiction, keys in checks:
        if all(key in valid for key in keys) and (clash := contradiction(valid)):
            problems.append(_located(clash, clash.where or keys[0], composition))
    return config, problems


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their dotted keys; an empty section is a leaf, and so is a list."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def _under(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def _located(problem: ConfigError, key: str, composition: Composition) -> ConfigError:
    where = ", ".join(filter(None, [key, composition.place(key)]))
    return ConfigError(problem.message, where=where, hint=problem.hint)


def _schema_problems(
    errors: Iterable[ErrorDetails], rules: Rules[C], composition: Composition
) -> Iterator[tuple[str, ConfigError]]:
    for error in errors:
        key = _key(error["loc"])
        if error["type"] == "extra_forbidden":
            for name, _ in flatten({key: error["input"]}):
                yield name, _located(_unknown(name, rules, composition), name, composition)
        elif error["type"] == "missing" and not isinstance(error["loc"][-1], int):
            yield key, _located(_absent(key, rules), key, composition)
        else:
            yield key, _located(_mistyped(key, error), key, composition)


def _key(location: tuple[int | str, ...]) -> str:
    """The dotted key of a pydantic location, which also names the optimiser whose rules were applied."""
    parts = list(location)
    if len(parts) > 1 and parts[0] == "optimizer" and parts[1] in OPTIMIZERS:
        parts.pop(1)
    return ".".join(map(str, parts))


def _unknown(key: str, rules: Rules[C], composition: Composition) -> ConfigError:
    if key in rules.groups:
        return ConfigError(f"{key} is a choice of files, not a key.", hint=f"{key}=NAME on the command line")
    owner = _owner(key, composition)
    hint = f"{owner} has it" if owner else suggest_key(key, [*rules.known_keys(composition.values), *rules.groups])
    return ConfigError(f"There is no key {key}.", hint=hint)


def _owner(key: str, composition: Composition) -> str | None:
    """The other choice of its group that a key belongs to, as in optimizer.momentum under optimizer=adamw."""
    section, _, leaf = key.partition(".")
    for name, kind in OPTIMIZERS.items():
        if section == "optimizer" and leaf in kind.model_fields and name != composition.choices.get("optimizer"):
            return f"optimizer={name}"
    return None


def _absent(key: str, rules: Rules[C]) -> ConfigError:
    if key in rules.groups:
        return ConfigError(f"No {key} is chosen.", hint=f"add it to the defaults list of your file, or {key}=NAME")
    return ConfigError(f"{key} must be given.", hint=f"{key}=...")


def _mistyped(key: str, error: ErrorDetails) -> ConfigError:
    given = error["input"]
    shown = {None: "null", True: "true", False: "false"}.get(given) if isinstance(given, bool | None) else repr(given)
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        expected = [choice.strip("' ") for choice in str(context["expected"]).replace(" or ", ",").split(",")]
        return ConfigError(f"{key} cannot be {mask(str(shown))}.", hint=suggest_choice(str(given), expected))
    if error["type"] == "value_error":
        return ConfigError(f"{key} {mask(str(context['error']))}.")
    if error["type"] in ("missing", "too_long"):
        return ConfigError(f"{key} has the wrong number of entries.")
    wanted = _WANTED.get(error["type"], error["msg"]).format(**context)
    return ConfigError(f"{key} must be {wanted}, not {mask(str(shown))}.")


TRAINING = Rules(Config, known_keys, GROUPS, CHECKS)
# Of a command with -m; its jobs are trainings like any other, also on a machine where no sweep could be run.
SWEEPING = Rules(Config, known_keys, GROUPS, (*CHECKS, *SWEEP_CHECKS))
