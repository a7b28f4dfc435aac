"""What a number of right answers says: intervals, pass@k, maj@k, and whether two policies differ on the same questions.

All intervals are two-sided, of 95%. They speak of other questions of the same kind, not of another training run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Two-sided 95% quantile of the normal distribution.
_Z = 1.959964
_TAIL = 0.025
RESAMPLES = 2000
# Resampled questions held at once: a data set of a million must not need as many numbers a thousandfold.
_DRAWN_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. method: how the interval was found."""

    value: float
    low: float
    high: float
    method: str

    def as_dict(self) -> dict[str, float | str]:
        return {"value": self.value, "low": self.low, "high": self.high, "method": self.method}


@dataclass(frozen=True)
class Difference:
    """Accuracy before and after on the same problems, and the 95% interval of the gain. All are fractions."""

    before_mean: float
    after_mean: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two policies on the same questions. gained: only the second is right; lost: only the first is.

    p: of McNemar's exact test. interval: of the difference of the two accuracies.
    """

    questions: int
    gained: int
    lost: int
    p: float
    interval: Difference


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion of independent trials, with the score interval, which keeps its coverage near 0 and 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    share, spread = successes / trials, _Z**2 / trials
    middle = (share + spread / 2) / (1 + spread)
    margin = _Z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # At the ends the bound is the end itself, which rounding may miss.
    low = 0.0 if successes == 0 else max(0.0, middle - margin)
    high = 1.0 if successes == trials else min(1.0, middle + margin)
    return Estimate(share, low, high, "Wilson")


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from `samples` of which `right` are.

    1 - C(samples - right, k) / C(samples, k): the share of the k-subsets that hold a right one.
    Source: Chen et al., "Evaluating large language models trained on code", arXiv:2107.03374, equation 1.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples, {right} of them right")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_is_right(answers: Sequence[str | None], right: Sequence[bool]) -> bool:
    """Whether the most frequent answer is right. None, no answer, has no vote; of equally frequent ones the first seen.

    right: whether each is, beside `answers`. Where nobody answers, nobody is right.
    """
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return False
    # max() keeps the first of equals, and a dict the order in which answers were first seen.
    winner = max(votes, key=votes.__getitem__)
    return right[list(answers).index(winner)]


def maj_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """The share of right majorities among disjoint groups of k consecutive samples; a last, smaller one is left out.

    Each group is one election as it would be held with k samples, so that the mean has no bias.
    """
    if len(answers) != len(right) or not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} of {len(answers)} answers and {len(right)} verdicts")
    groups = [slice(start, start + k) for start in range(0, len(answers) - k + 1, k)]
    return sum(majority_is_right(answers[group], right[group]) for group in groups) / len(groups)


def bootstrap_mean(values: Sequence[float] | NDArray[np.float64], *, seed: int = 0) -> Estimate:
    """The mean over questions, with the interval between the 2.5th and 97.5th percentiles of resampled means.

    values: (questions,) one number each: several samples of one question are no independent trials.
    Source: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"need a vector of values, not {array.shape}")
    draw = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, _DRAWN_AT_ONCE // len(array))
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        means[start : start + count] = array[draw.integers(len(array), size=(count, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [_TAIL, 1 - _TAIL])
    return Estimate(float(array.mean()), float(low), float(high), "bootstrap")


def mcnemar_p(gained: int, lost: int) -> float:
    """Two-sided exact test that a change of verdict is as often for the better as for the worse.

    min(1, 2 * P[Binomial(gained + lost, 1/2) <= min(gained, lost)]); 1 where no verdict changed.
    Source: McNemar, Psychometrika 12, 1947, in its exact form.
    """
    if gained < 0 or lost < 0:
        raise ValueError(f"{gained} gained, {lost} lost")
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    # Whole numbers to the end: 2^changed overflows a float from 1,024 changes on.
    return min(1.0, float(_ratio(2 * tail, 1 << changed)))


def _ratio(numerator: int, denominator: int) -> float:
    shift = max(0, denominator.bit_length() - 900)
    return (numerator >> shift) / (denominator >> shift)


def paired_difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Difference:
    """The gain in accuracy on the same problems, with a 95% interval for the difference of paired proportions.

    The interval is the normal approximation after adding half a problem to each of the four cells (right or wrong,
    before and after), which keeps its coverage for few problems and for few changes. It speaks of other problems of
    the same kind, not of another training run.
    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24, 2005.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"need two equally long vectors of outcomes, not {before.shape} and {after.shape}")
    count = len(before) + 2.0
    gained = (int((after & ~before).sum()) + 0.5) / count
    lost = (int((before & ~after).sum()) + 0.5) / count
    margin = _Z * math.sqrt(max(gained + lost - (gained - lost) ** 2, 0.0) / count)
    before_mean, after_mean = float(before.mean()), float(after.mean())
    return Difference(
        before_mean=before_mean,
        after_mean=after_mean,
        gain=after_mean - before_mean,
        low=max(-1.0, gained - lost - margin),
        high=min(1.0, gained - lost + margin),
    )


def compare(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Comparison:
    """Compare verdicts (questions,) on the same questions, in the same order."""
    interval = paired_difference(first, second)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return Comparison(len(first), gained, lost, mcnemar_p(gained, lost), interval)
