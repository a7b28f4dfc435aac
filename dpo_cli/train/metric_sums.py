"""Metrics as sums and counts, so that a mean over micro-batches, steps or ranks is the mean over examples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpo_cli.engine.ranks import Ranks


class MetricSums:
    """Named sums and counts that stay on the device until somebody asks for the means."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Count every value in; with `where` (bool, same shape) only those where it holds."""
        values = values.detach().double()
        if where is None:
            total, count = values.sum(), torch.full((), values.numel(), dtype=torch.float64, device=values.device)
        else:
            total, count = torch.where(where, values, 0).sum(), where.double().sum()
        self._accumulate(name, torch.stack((total, count)))

    def merge(self, other: MetricSums) -> None:
        for name, pair in other._totals.items():
            self._accumulate(name, pair)

    def means(self) -> dict[str, float]:
        """Means in order of first appearance; what was never counted is left out. One transfer from the device."""
        return {name: total / count for name, (total, count) in self.state().items() if count}

    def state(self) -> dict[str, tuple[float, float]]:
        """Sums and counts as numbers, for a checkpoint."""
        if not self._totals:
            return {}
        rows = torch.stack(list(self._totals.values())).tolist()
        return {name: (total, count) for name, (total, count) in zip(self._totals, rows, strict=True)}

    def over_ranks(self, ranks: Ranks) -> MetricSums:
        """The sums of all ranks."""
        if ranks.size == 1:
            return self
        whole: dict[str, list[float]] = {}
        for state in ranks.gather(self.state()):
            for name, pair in state.items():
                before = whole.setdefault(name, [0.0, 0.0])
                whole[name] = [mine + theirs for mine, theirs in zip(before, pair, strict=True)]
        return MetricSums.from_state({name: (total, count) for name, (total, count) in whole.items()})

    @classmethod
    def from_state(cls, state: Mapping[str, tuple[float, float]], device: torch.device | None = None) -> MetricSums:
        sums = cls()
        for name, pair in state.items():
            sums._totals[name] = torch.tensor(pair, dtype=torch.float64, device=device)
        return sums

    def _accumulate(self, name: str, pair: Tensor) -> None:
        self._totals[name] = self._totals[name] + pair if name in self._totals else pair
