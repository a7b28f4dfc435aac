"""Check a loss section against the function it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from dpo_cli.config.loss_signature import LossSignature, read_signature
from dpo_cli.config.shipped import choices, documented_keys, shipped_files
from dpo_cli.config.suggest import closest
from dpo_cli.errors import ConfigError, DpoError

_OURS = "dpo_cli.losses."
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
}


def check_loss(section: Mapping[str, Any], place: Callable[[str], str | None]) -> list[DpoError]:
    """Problems of a composed loss section: no such function, unknown, missing, mistyped or senseless parameters.

    place: tells where a dotted key was set.
    """
    target = section.get("_target_")
    if not isinstance(target, str):
        return []  # the schema says so already
    try:
        signature = read_signature(target)
    except ConfigError as error:
        where = ", ".join(filter(None, ["loss._target_", place("loss._target_")]))
        return [ConfigError(error.message, where=where, hint=error.hint)]
    given = {name: value for name, value in section.items() if name not in ("_target_", "_partial_")}
    if signature is None:
        return []
    function = target.rpartition(".")[2]
    problems: list[DpoError] = []
    for name, value in given.items():
        key = f"loss.{name}"
        where = ", ".join(filter(None, [key, place(key)]))
        if name in signature.names:
            if fault := _fault(target, name, value, signature):
                problems.append(ConfigError(f"{key} must be {fault}, not {value!r}.", where=where))
        elif not signature.open:
            problems.append(
                ConfigError(f"{function} has no parameter {name}.", where=where, hint=_hint(name, signature.names))
            )
    for parameter in signature.parameters:
        if parameter.required and parameter.name not in given:
            problems.append(
                ConfigError(
                    f"loss.{parameter.name} must be given: {function} has no default for it.",
                    where="loss",
                    hint=f"loss.{parameter.name}=...",
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
