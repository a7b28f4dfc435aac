"""What findings look at: the lines of metrics so far, and the settings that give them their meaning."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Any

# Training lines kept beside the first ones: a median of gradient norms wants some tens, nothing looks back further.
RECENT_LINES = 40
# What a run began with is the mean over so many training lines, where no evaluation came before the first step.
OPENING_LINES = 3
# One line may be an odd batch; what holds on average over so many is no accident of one.
STEADY_LINES = 3

# Losses whose rewards are beta * (summed log-prob - that of the reference), so that rewards / beta are nats.
_REWARDS_IN_NATS = frozenset(
    ("dpo", "robust_dpo", "pdpo", "hinge", "apo_zero", "apo_down", "nca_pair", "exo_pair", "sppo_hard", "discopop")
    + ("bco_pair", "plackett_luce", "kto")
)
# Losses that are -log sigmoid(margin), so that ln 2 stands for a margin of zero.
_LOGISTIC = frozenset({"dpo", "robust_dpo", "pdpo", "sigmoid_norm", "aot"})


class Severity(IntEnum):
    """note: worth knowing, often normal. warning: usually costs quality. alarm: hardly worth going on with."""

    NOTE = 1
    WARNING = 2
    ALARM = 3


@dataclass(frozen=True)
class Finding:
    """what is seen, with its figures; why; and overrides to try, the first one first."""

    severity: Severity
    what: str
    why: str
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Setup:
    """The settings that findings read.

    loss: the name of the function, without `_loss`. parameters: its keys. reference: model.reference, None for start.
    """

    loss: str
    parameters: Mapping[str, Any]
    lr: float
    warmup_steps: int
    max_grad_norm: float | None
    global_pairs: int
    reference: str | None
    reference_moves: bool
    max_new_tokens: int
    keeps_cut: bool

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Setup:
        """settings: a run's config.yaml as a mapping."""
        loss, model, optimizer = settings["loss"], settings["model"], settings["optimizer"]
        return cls(
            loss=str(loss["_target_"]).rpartition(".")[2].removesuffix("_loss"),
            parameters=loss,
            lr=optimizer["lr"],
            warmup_steps=optimizer["warmup_steps"],
            max_grad_norm=optimizer["max_grad_norm"],
            global_pairs=settings["global_pairs"],
            reference=None if model["reference"] in (None, "start") else str(model["reference"]),
            reference_moves=model["reference_sync_steps"] is not None,
            max_new_tokens=settings["rollout"]["max_new_tokens"],
            keeps_cut=settings["rollout"]["keep_cut"],
        )

    @property
    def beta(self) -> float | None:
        return self.parameters.get("beta")

    @property
    def preference_loss(self) -> str:
        """The metric that holds the loss of preference pairs alone."""
        return "loss/dpo" if self.loss == "pdpo" else "loss"

    @property
    def is_logistic(self) -> bool:
        """Whether a margin of zero costs ln 2, and nothing but the margin costs anything."""
        return self.loss in _LOGISTIC and not self.parameters.get("nll_alpha")

    @property
    def nats_per_reward(self) -> float | None:
        """A reward times this is a difference of summed log-probs from the reference; None where it is none."""
        changed = self.parameters.get("f_divergence", "reverse_kl") != "reverse_kl"
        changed = changed or self.parameters.get("average_logps", False) or self.parameters.get("reference_free", False)
        return 1 / self.beta if self.loss in _REWARDS_IN_NATS and self.beta and not changed else None


class Curves:
    """The first lines of a run and its latest ones; a line is a row of metrics.jsonl."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._opening: list[Mapping[str, Any]] = []
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT_LINES)
        self._first_eval: Mapping[str, Any] | None = None
        self._last_eval: Mapping[str, Any] | None = None
        self._lowest_eval_loss: float | None = None
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        if row["split"] == "eval":
            self._first_eval = self._first_eval or row
            self._last_eval = row
            if (loss := _number(row, "loss")) is not None:
                lowest = self._lowest_eval_loss
                self._lowest_eval_loss = loss if lowest is None else min(loss, lowest)
            return
        if len(self._opening) < OPENING_LINES:
            self._opening.append(row)
        self._recent.append(row)

    @property
    def step(self) -> int:
        """Of the latest training line; 0 before the first."""
        return int(self._recent[-1]["step"]) if self._recent else 0

    @property
    def lowest_evaluated_loss(self) -> float | None:
        return self._lowest_eval_loss

    def steps(self, lines: int) -> int | None:
        """Optimiser steps that the latest lines are means over; None while there are not so many lines."""
        if len(self._recent) < lines:
            return None
        before = self._recent[-lines - 1]["step"] if len(self._recent) > lines else 0
        return int(self._recent[-1]["step"] - before)

    def steady(self, name: str, lines: int = STEADY_LINES) -> float | None:
        """Mean over the latest lines; None while there are not so many, or where one of them lacks the metric."""
        values = self.recent(name, lines)
        return sum(values) / lines if len(values) == lines else None

    def recent(self, name: str, lines: int = RECENT_LINES) -> list[float]:
        """Values of the latest lines that have the metric, oldest first."""
        latest = islice(self._recent, max(0, len(self._recent) - lines), None)
        return [value for row in latest if (value := _number(row, name)) is not None]

    def opening(self, name: str) -> float | None:
        """Mean over the first training lines; None before they are complete."""
        values = [value for row in self._opening if (value := _number(row, name)) is not None]
        return sum(values) / OPENING_LINES if len(values) == OPENING_LINES else None

    def before_training(self, name: str) -> float | None:
        """Of the evaluation before the first step; None where nothing was held out."""
        first = self._first_eval
        return _number(first, name) if first is not None and first["step"] == 0 else None

    def evaluated(self, name: str) -> float | None:
        """Of the latest evaluation."""
        return None if self._last_eval is None else _number(self._last_eval, name)

    def at_start(self, name: str) -> float | None:
        """Before the first step where that was evaluated, else over the first lines."""
        before = self.before_training(name)
        return self.opening(name) if before is None else before


def shift(curves: Curves, setup: Setup, side: str) -> float | None:
    """How far summed log-probs of a side have moved since the start, in nats a response.

    Rewards say so of every training batch; where they do not, held-out responses do, which are the same each time.
    """
    nats, reward = setup.nats_per_reward, curves.steady(f"rewards/{side}")
    if nats is not None and reward is not None and setup.reference is None and not setup.reference_moves:
        return reward * nats
    before, now = curves.before_training(f"logps/{side}"), curves.evaluated(f"logps/{side}")
    return None if before is None or now is None else now - before


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """NaN and infinities, which a line holds as null, are no evidence of anything but themselves."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
