"""The run's loss as a function of a pair's two log-ratios: its values, its slopes and the rewards it implies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_cli.config.schema import Config
from dpo_cli.errors import DpoError
from dpo_cli.losses.types import LossInput, LossValues, PairLogps, RankedLogps, as_loss_values
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Surface:
    """values, slope_chosen, slope_rejected: (rows, columns), of a typical pair at the log-ratios of a grid.

    The slopes are d loss / d log-ratio.
    """

    values: Floats
    slope_chosen: Floats
    slope_rejected: Floats


@dataclass(frozen=True)
class LossView:
    objective: Objective

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LossView | None:
        """None for a loss that cannot be imported here, is not of pairs, or needs more than log-probs."""
        try:
            objective = Objective.of(build_loss(Config.model_validate(settings)))
        # Settings of another version, or a user's own loss that is not here: the page does without.
        except (DpoError, ValueError, TypeError):
            return None
        declaration = objective.declaration
        if declaration.kind not in ("pair", "ranked") or declaration.statistics:
            return None
        return cls(objective)

    def margins(self, chosen: Floats, rejected: Floats, reference: Floats | None, tokens: Floats) -> Floats | None:
        """(pairs,) reward of chosen less that of rejected; None where the loss has no rewards.

        chosen, rejected: (pairs,) log-probs. reference, tokens: (2, pairs).
        """
        with torch.no_grad():
            found = self._values(torch.from_numpy(np.stack((chosen, rejected))), reference, tokens)
        rewards = None if found is None else found.rewards
        if rewards is None:
            return None
        best, worst = rewards if isinstance(rewards, tuple) else (rewards[:, 0], rewards[:, 1])
        margins: Floats = (best - worst).double().numpy()
        return margins

    def surface(self, x1: Floats, x2: Floats, *, start: Floats, has_reference: bool, tokens: Floats) -> Surface | None:
        """The loss of one pair over a grid of log-ratios, both (rows, columns).

        start, tokens: (2,), log-probs that the ratios are against, and lengths.
        None for a loss in which a pair has no value of its own.
        """
        if self.objective.declaration.couples_batch:
            return None
        count = x1.size
        at = torch.from_numpy(np.stack((x1.ravel(), x2.ravel())) + start[:, None]).requires_grad_()
        spread = np.repeat(start[:, None], count, axis=1)
        found = self._values(at, spread if has_reference else None, np.repeat(tokens[:, None], count, axis=1))
        if found is None:
            return None
        (slopes,) = torch.autograd.grad(found.values.sum(), at)
        values = found.values.detach().double().numpy()
        if not np.isfinite(values).all():
            return None
        return Surface(values.reshape(x1.shape), *(side.numpy().reshape(x1.shape) for side in slopes))

    def _values(self, policy: torch.Tensor, reference: Floats | None, tokens: Floats) -> LossValues | None:
        needs = self.objective.declaration.needs_reference
        if needs and reference is None:
            return None
        given = torch.from_numpy(reference) if needs and reference is not None else None
        counted = torch.from_numpy(tokens)
        batch: LossInput
        if self.objective.declaration.kind == "ranked":
            batch = RankedLogps(
                policy=policy.T,
                reference=None if given is None else given.T,
                tokens=counted.T,
                present=torch.ones(policy.shape[1], 2, dtype=torch.bool),
            )
        else:
            batch = PairLogps(
                policy_chosen=policy[0],
                policy_rejected=policy[1],
                reference_chosen=None if given is None else given[0],
                reference_rejected=None if given is None else given[1],
                chosen_tokens=counted[0],
                rejected_tokens=counted[1],
            )
        try:
            return as_loss_values(self.objective.loss(batch), policy.shape[1])
        except (DpoError, RuntimeError, TypeError, ValueError):
            # A user's own loss may want what is not recorded.
            return None
