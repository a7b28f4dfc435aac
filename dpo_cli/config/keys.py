"""The names of all keys that a configuration may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from dpo_cli.config.loss_signature import read_signature
from dpo_cli.config.schema import OPTIMIZERS, Config, optimizer_name
from dpo_cli.errors import ConfigError


def known_keys(values: Mapping[str, Any]) -> list[str]:
    """Dotted names of all settings, those of the optimiser and the loss in use included."""
    optimizer = OPTIMIZERS[optimizer_name(values.get("optimizer"))]
    keys = [key for key in fields_of(Config) if not key.startswith(("optimizer", "loss"))]
    keys += [f"optimizer.{name}" for name in optimizer.model_fields]
    return keys + [f"loss.{name}" for name in _loss_parameters(values.get("loss"))]


def _loss_parameters(section: Any) -> list[str]:
    target = section.get("_target_") if isinstance(section, Mapping) else None
    try:
        signature = read_signature(target) if isinstance(target, str) else None
    except ConfigError:
        return []
    return signature.names if signature is not None else []


def fields_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of a schema's keys, those of its sections included."""
    for name, field in model.model_fields.items():
        nested = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_model(kind)]
        if nested and get_origin(field.annotation) is not tuple:
            yield from fields_of(nested[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
