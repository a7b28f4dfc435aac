"""Held-out pairs one by one: how each was ranked at every recorded evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.report.loss_view import LossView
from dpo_cli.rollout.statistics import Estimate, wilson

Floats = NDArray[np.float64]
_BUCKETS = 5


@dataclass(frozen=True)
class HeldOutPairs:
    """identities: lines of eval_pairs.jsonl. steps: (evaluations,). chosen, rejected: (evaluations, pairs) log-probs of
    the policy in nats, NaN where they were not finite. reference: (2, pairs), None of a run without one.
    tokens: (2, pairs), as the loss counts them. lengths: (2, pairs).
    """

    identities: Sequence[Mapping[str, Any]]
    steps: NDArray[np.int64]
    chosen: Floats
    rejected: Floats
    reference: Floats | None
    tokens: Floats
    lengths: Floats

    @classmethod
    def of(cls, identities: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> HeldOutPairs | None:
        """None where the lines do not belong together."""
        count = len(identities)
        rows = [row for row in rows if all(len(row.get(side) or ()) == count for side in ("chosen", "rejected"))]
        if not rows or not count:
            return None
        try:
            references = [identity["reference"] for identity in identities]
            return cls(
                identities=identities,
                steps=np.array([row["step"] for row in rows], dtype=np.int64),
                chosen=np.array([row["chosen"] for row in rows], dtype=np.float64),
                rejected=np.array([row["rejected"] for row in rows], dtype=np.float64),
                reference=None if None in references else np.array(references, dtype=np.float64).T,
                tokens=np.array([identity["tokens"] for identity in identities], dtype=np.float64).T,
                lengths=np.array([identity["length"] for identity in identities], dtype=np.float64).T,
            )
        except (KeyError, TypeError, ValueError):
            return None

    def log_ratios(self) -> tuple[Floats, Floats]:
        """Of chosen and rejected, each (evaluations, pairs): to the reference, else to the first evaluation."""
        chosen, rejected = (self.chosen[0], self.rejected[0]) if self.reference is None else self.reference
        return self.chosen - chosen, self.rejected - rejected

    def source(self, pair: int) -> str:
        """The file a pair is from."""
        return str(self.identities[pair].get("origin", "")).rpartition(" row ")[0] or "?"


@dataclass(frozen=True)
class Ranking:
    """Pairs as the run's loss ranks them.

    margins: (evaluations, pairs). by: what the margin is, in words.
    """

    pairs: HeldOutPairs
    margins: Floats
    by: str

    @classmethod
    def of(cls, pairs: HeldOutPairs, loss: LossView | None, *, starts_as_reference: bool) -> Ranking:
        """By the rewards of the loss; where it has none that can be told from log-probs alone, by log-probs.

        starts_as_reference: before the first step the policy is its reference, so margins are zero then but for
        rounding, which would rank half of the pairs right.
        """
        margins, by = _margins(pairs, loss)
        if starts_as_reference and pairs.reference is not None and pairs.steps[0] == 0:
            margins[0] = 0.0
        return cls(pairs, margins, by)

    @property
    def right(self) -> NDArray[np.bool_]:
        """(evaluations, pairs)"""
        right: NDArray[np.bool_] = self.margins > 0
        return right

    def accuracy(self, evaluation: int = -1) -> Estimate:
        right = self.right[evaluation]
        return wilson(int(right.sum()), len(right))

    def learnt_at(self) -> NDArray[np.int64]:
        """(pairs,) place of the evaluation since which a pair was ranked right to the end; -1 where it is not."""
        wrong = ~self.right
        last_wrong = np.where(wrong.any(0), len(wrong) - 1 - wrong[::-1].argmax(0), -1)
        return np.where(self.right[-1], last_wrong + 1, -1)

    def confidently_wrong(self, count: int) -> list[int]:
        worst = np.argsort(np.nan_to_num(self.margins[-1], nan=np.inf), kind="stable")
        return [int(pair) for pair in worst[:count] if self.margins[-1][pair] < 0]

    def confidently_right(self, count: int) -> list[int]:
        best = np.argsort(-np.nan_to_num(self.margins[-1], nan=-np.inf), kind="stable")
        return [int(pair) for pair in best[:count] if self.margins[-1][pair] > 0]

    def lost(self, count: int) -> list[int]:
        """Ranked right at some evaluation and wrong at the end, the largest fall first."""
        best = np.nan_to_num(self.margins, nan=-np.inf)[:-1].max(0, initial=-np.inf)
        fell = (best > 0) & (self.margins[-1] < 0)
        order = np.argsort(self.margins[-1] - best, kind="stable")
        return [int(pair) for pair in order if fell[pair]][:count]

    def learnt_last(self, count: int) -> list[int]:
        """Ranked right for good only since the latest evaluations."""
        since = self.learnt_at()
        order = np.lexsort((self.margins[-1], -since))
        return [int(pair) for pair in order if since[pair] >= max(2, len(self.margins) // 2)][:count]

    def by_source(self) -> list[tuple[str, Estimate, int]]:
        sources = [self.pairs.source(pair) for pair in range(len(self.pairs.identities))]
        return [
            (source, *self._among(np.array([each == source for each in sources]))) for source in dict.fromkeys(sources)
        ]

    def by_length_difference(self) -> list[tuple[str, Estimate, int]]:
        """In about equally large groups of len(chosen) - len(rejected), in tokens."""
        difference = self.pairs.lengths[0] - self.pairs.lengths[1]
        edges = np.unique(np.quantile(difference, np.linspace(0, 1, _BUCKETS + 1)).round())
        if len(edges) < 2:
            return [(_signed(edges[0]), *self._among(np.ones(len(difference), dtype=bool)))]
        found = []
        for place, (low, high) in enumerate(pairwise(edges)):
            last = place == len(edges) - 2
            inside = (difference >= low) & ((difference <= high) if last else (difference < high))
            top = high if last else high - 1
            name = _signed(low) if top <= low else f"{_signed(low)} to {_signed(top)}"
            if inside.any():
                found.append((name, *self._among(inside)))
        return found

    def _among(self, which: NDArray[np.bool_]) -> tuple[Estimate, int]:
        right = self.right[-1][which]
        return wilson(int(right.sum()), len(right)), len(right)


def _margins(pairs: HeldOutPairs, loss: LossView | None) -> tuple[Floats, str]:
    found = [
        None if loss is None else loss.margins(chosen, rejected, pairs.reference, pairs.tokens)
        for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True)
    ]
    rewarded = [margins for margins in found if margins is not None]
    if len(rewarded) == len(found):
        return np.stack(rewarded), "reward margin"
    if pairs.reference is not None:
        chosen, rejected = pairs.log_ratios()
        return chosen - rejected, "log-ratio margin, in nats"
    return pairs.chosen - pairs.rejected, "log-prob margin, in nats"


def _signed(tokens: float) -> str:
    return "0" if not tokens else f"{tokens:+.0f}".replace("-", "−")
