"""What differs between the settings a run was started with and those it is to go on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.config.check import flatten
from dpo_cli.errors import ConfigError

ABSENT = "(absent)"
# Settings that leave every number of the training as it is, or change it in its last digits at most. A name ending in a
# dot stands for its whole section.
FREE_ON_RESUME = (
    "run_dir",
    "store_dir",
    "resume",
    "plan",
    "log_every",
    "log_level",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "tokens_per_microbatch",
    "model.attention",
    "model.gradient_checkpointing",
    "model.checkpoint_every",
    "model.offload_checkpoints",
    "model.pad_rows_to",
    "data.workers",
    "eval.task",
    "eval.task.",
    "health.",
    "hardware.",
    "logger",
    "logger.",
)
_LENGTH = ("epochs", "max_steps")


@dataclass(frozen=True)
class Change:
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Leaves that differ, in the order of `new`, then those that only `old` has."""
    before, after = dict(flatten(old)), dict(flatten(new))
    keys = [*after, *(key for key in before if key not in after)]
    changes = (Change(key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [change for change in changes if change.old != change.new]


def changes_experiment(change: Change, *, schedule: str) -> bool:
    """Whether going on with this change would make another experiment of the run.

    The length of training belongs to the experiment unless the learning rate is constant: any other schedule has bent
    towards the end it was given.
    """
    if change.key in _LENGTH:
        return schedule != "constant"
    return not any(
        change.key == free or (free.endswith(".") and change.key.startswith(free)) for free in FREE_ON_RESUME
    )


def refuse_another_experiment(old: Mapping[str, Any], new: Mapping[str, Any], *, run_folder: str) -> list[Change]:
    """The changes a resumed run may make. Raises ConfigError showing all that it may not."""
    changes = diff(old, new)
    schedule = str(new["optimizer"]["schedule"])
    refused = [change for change in changes if changes_experiment(change, schedule=schedule)]
    if refused:
        raise ConfigError(
            "These settings would make another experiment of the run:\n" + _listed(refused),
            where=run_folder,
            hint=_hint(refused),
        )
    return changes


def _listed(changes: Sequence[Change]) -> str:
    return "\n".join(f"    {change}" for change in changes)


def _hint(refused: Sequence[Change]) -> str:
    if all(change.key in _LENGTH for change in refused):
        return (
            "only a run that began with optimizer.schedule=constant can be made longer; start a new one from its final/"
        )
    return "leave them as they were, or start a new run with model.path=RUN_FOLDER/final"
