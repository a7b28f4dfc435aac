"""Check a loss section against the function it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from dpo_cli.config.loss_signature import LossSignature, read_signature
from dpo_cli.config.shipped import choices, documented_keys, shipped_files
from dpo_cli.config.suggest import closest
from dpo_cli.errors import ConfigError, DpoError

_OURS = "dpo_cli.losses."
_MIX = "dpo_cli.losses.mix.mix_loss"
# What our own losses require of their parameters; another's `beta` may mean anything.
_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "beta": (lambda value: value > 0, "greater than 0"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "at least 0 and less than 0.5"),
    "nll_alpha": (lambda value: value >= 0, "at least 0"),
    "gamma": (lambda value: value >= 0, "at least 0"),
    "gamma_warmup_steps": (lambda value: value >= 0, "at least 0"),
    "advantage_clip": (lambda value: value > 0, "greater than 0"),
    "f_alpha": (lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
    "ld_alpha": (lambda value: 0 <= value <= 1, "at least 0 and at most 1"),
    "tau": (lambda value: 0 < value <= 1, "greater than 0 and at most 1"),
    "desirable_weight": (lambda value: value > 0, "greater than 0"),
    "undesirable_weight": (lambda value: value > 0, "greater than 0"),
}
_RANGES_OF_LOSS: Mapping[tuple[str, str], tuple[Callable[[float], bool], str]] = {
    # ORPO without its odds term is plain imitation, which is a legitimate control.
    ("orpo_loss", "beta"): (lambda value: value >= 0, "at least 0"),
    ("exo_pair_loss", "label_smoothing"): (lambda value: 0 < value < 0.5, "greater than 0 and less than 0.5"),
}
_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "float": (lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    "int": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "text"),
    "Sequence[Mapping[str, Any]]": (lambda value: isinstance(value, list) and bool(value), "a list of parts"),
}


def check_loss(section: Mapping[str, Any], place: Callable[[str], str | None]) -> list[DpoError]:
    """Problems of a composed loss section: no such function, unknown, missing, mistyped or senseless parameters.

    place: tells where a dotted key was set.
    """
    target = section.get("_target_")
    if not isinstance(target, str):
        return []  # the schema says so already
    given = {name: value for name, value in section.items() if name not in ("_target_", "_partial_")}
    problems = _check_parameters(target, given, "loss", place, target_key="loss._target_")
    if target == _MIX and not problems:
        for number, part in enumerate(given["losses"]):
            problems += _check_part(part, f"loss.losses[{number}]", place("loss.losses"))
    return problems


def _check_part(part: Any, key: str, place: str | None) -> list[DpoError]:
    """Problems of one entry of a mix: {loss, weight} and parameters of that loss. key: its own; place: the list's."""
    where = ", ".join(filter(None, [key, place]))
    if not isinstance(part, Mapping) or not isinstance(part.get("loss"), str) or "weight" not in part:
        return [ConfigError(f"{key} must be of the form {{loss: NAME, weight: NUMBER}}, not {part!r}.", where=where)]
    weight, name = part["weight"], part["loss"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        return [ConfigError(f"{key}.weight must be a number greater than 0, not {weight!r}.", where=where)]
    ours = [choice for choice in choices("loss") if choice != "mix"]
    if "." not in name and name not in ours:
        found = closest(name, ours)
        hint = f"{name}: did you mean {found}?" if found else f"one of {', '.join(ours)}"
        return [ConfigError(f"There is no loss {name} to mix.", where=where, hint=hint)]
    target = name if "." in name else f"{_OURS}{name}.{name}_loss"
    given = {name: value for name, value in part.items() if name not in ("loss", "weight")}
    # The mix brings a beta for every part that takes one.
    return _check_parameters(target, given, key, lambda _: place, target_key=f"{key}.loss", brought=("beta",))


def _check_parameters(
    target: str,
    given: Mapping[str, Any],
    section: str,
    place: Callable[[str], str | None],
    *,
    target_key: str,
    brought: Collection[str] = (),
) -> list[DpoError]:
    """Problems of the parameters of one function. section: their dotted prefix. brought: set by somebody else."""
    try:
        signature = read_signature(target)
    except ConfigError as error:
        where = ", ".join(filter(None, [target_key, place(target_key)]))
        return [ConfigError(error.message, where=where, hint=error.hint)]
    if signature is None:
        return []
    function = target.rpartition(".")[2]
    problems: list[DpoError] = []
    for name, value in given.items():
        key = f"{section}.{name}"
        where = ", ".join(filter(None, [key, place(key)]))
        if name in signature.names:
            if fault := _fault(target, name, value, signature):
                problems.append(ConfigError(f"{key} must be {fault}, not {value!r}.", where=where))
        elif not signature.open:
            problems.append(
                ConfigError(f"{function} has no parameter {name}.", where=where, hint=_hint(name, signature.names))
            )
    for parameter in signature.parameters:
        if parameter.required and parameter.name not in given and parameter.name not in brought:
            problems.append(
                ConfigError(
                    f"{section}.{parameter.name} must be given: {function} has no default for it.",
                    where=section,
                    hint=f"loss.{parameter.name}=..." if section == "loss" else f"{parameter.name}: NUMBER",
                )
            )
    return problems


def _fault(target: str, name: str, value: Any, signature: LossSignature) -> str | None:
    if value == "???":
        return None  # reported with all other missing values
    annotation = next(p.annotation for p in signature.parameters if p.name == name)
    if allowed := _literals(annotation):
        return None if value in allowed else f"one of {', '.join(allowed)}"
    fits, wanted = _TYPES.get(annotation or "", (lambda _: True, ""))
    if not fits(value):
        return wanted
    if target.startswith(_OURS) and isinstance(value, int | float) and not isinstance(value, bool):
        in_range, wanted = _RANGES_OF_LOSS.get(
            (target.rpartition(".")[2], name), _RANGES.get(name, (lambda _: True, ""))
        )
        # Not even a comparison holds for NaN, but infinity satisfies "greater than 0".
        if not in_range(value) or value == float("inf"):
            return wanted if value != float("inf") else "finite"
    return None


def _literals(annotation: str | None) -> list[str]:
    """The choices of an annotation such as Literal["a", "b"]; none of any other."""
    found = re.fullmatch(r"(?:\w+\.)?Literal\[(.*)\]", annotation or "")
    return [str(choice) for choice in ast.literal_eval(f"[{found[1]}]")] if found else []


def _hint(name: str, known: list[str]) -> str:
    files = shipped_files()
    others = [
        loss for loss in choices("loss") if name in {key.name for key in documented_keys(files[f"loss/{loss}.yaml"])}
    ]
    if others:
        have = "has it" if len(others) == 1 else "have it"
        return f"leave it out; {' and '.join(f'loss={loss}' for loss in others)} {have}"
    if not known:
        return "leave it out: this loss has no parameters"
    found = closest(name, known)
    return f"{name}: did you mean {found}?" if found else f"it takes {', '.join(known)}"
