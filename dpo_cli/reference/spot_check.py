"""Prove before training that the reference values are those of the reference model: score a few rows once more.

Catches what no key can: a store edited or copied by hand, log-prob columns made by another model, a model that
computes otherwise than when it scored (another kernel, a broken build).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpo_cli.data.example import Example, Examples, FloatArray
from dpo_cli.errors import StoreError
from dpo_cli.reference.keys import example_keys, key_array
from dpo_cli.reference.score import Score
from dpo_cli.reference.shards import Logps
from dpo_cli.reference.store import ReferenceStore
from dpo_cli.reference.sums import ReferenceSums, weighted_sum

# Root mean square of a token's log-prob between two computations of it that round differently, in nats, with room to
# spare. Measured between packings of the same rows on a 12-layer model with logits of standard deviation 3: float32
# 3e-6 (largest 2e-5), bfloat16 0.02 (largest 0.12), float64 below 1e-13. Another model is off by 0.3 and more.
_NOISE_PER_TOKEN = {"float64": 1e-10, "float32": 5e-5, "float16": 1e-2, "bfloat16": 5e-2}


def tolerance_per_token(dtype: str) -> float:
    """Root-mean-square difference of a token's log-prob, in nats, that this dtype's rounding may explain.

    dtype: "float32", "torch.bfloat16", ... A packed row rounds otherwise than another that holds the same response,
    because matrix products block their sums by shape.
    """
    return _NOISE_PER_TOKEN[dtype.removeprefix("torch.")]


@dataclass(frozen=True)
class SpotCheck:
    """What was scored again, and how far off it was.

    largest: the largest root-mean-square difference a token within one response, in nats; for values known only as
        sums, the sum's difference over the square root of its tokens.
    """

    responses: int
    tokens: int
    largest: float
    tolerance: float

    @property
    def line(self) -> str:
        return (
            f"reference: {self.responses:,} random responses scored again agree "
            f"(largest difference {self.largest:.1e} nats a token, rounding explains {self.tolerance:.0e})"
        )


def spot_check(
    examples: Examples,
    sums: ReferenceSums,
    score: Score,
    *,
    k: int,
    seed: int,
    tolerance: float,
    store: ReferenceStore | None = None,
) -> SpotCheck:
    """Score the responses of `k` random examples again and compare with the sums the run uses.

    tolerance: as `tolerance_per_token` gives it. store: when given, its entries are compared token by token too.
    Examples are scored one at a time, so any that training can fit, this can.
    Raises StoreError naming the rows that disagree.
    """
    count = min(k, len(sums.indices))
    drawn = np.sort(np.random.default_rng(seed).choice(sums.indices, size=count, replace=False))
    responses = tokens = 0
    largest = 0.0
    wrong: list[str] = []
    for index in drawn.tolist():
        example = examples[index]
        # Values that came with the data were computed elsewhere, in a dtype nobody noted.
        allowed_noise = tolerance if example.reference is None else max(tolerance, _NOISE_PER_TOKEN["bfloat16"])
        stored = _entries(example, store)
        for number, (again, used) in enumerate(zip(score([example])[0], sums.of(index), strict=True)):
            weights = np.ones(len(again), np.float32) if example.weights is None else example.weights[number]
            differences = [(abs(weighted_sum(again, weights) - used), _room(weights, allowed_noise))]
            if stored is not None:
                per_token = again.astype(np.float64) - stored[number]
                differences.append((float(np.linalg.norm(per_token)), _room(np.ones_like(weights), allowed_noise)))
            responses, tokens = responses + 1, tokens + len(again)
            largest = max(largest, *(off / math.sqrt(len(again)) for off, _ in differences))
            # Not "off > room": a NaN must count as a disagreement.
            if not all(off <= room for off, room in differences):
                found = f"{used:.4f} used, {weighted_sum(again, weights):.4f} scored again, {len(again):,} tokens"
                wrong.append(f"{example.origin or f'example {index}'}, response {number + 1}: {found}")
    if wrong:
        raise _disagreement(wrong, responses, any(examples[int(index)].reference is not None for index in drawn), store)
    return SpotCheck(responses, tokens, largest, tolerance)


def largest_rounding(dtype: str, *, brought: bool) -> float:
    """How far a response's log-prob may be off by rounding, over the square root of its tokens, in nats.

    brought: the values came with the data, computed elsewhere in a dtype nobody noted.
    """
    noise = tolerance_per_token(dtype)
    return _room(np.ones(1, np.float32), max(noise, _NOISE_PER_TOKEN["bfloat16"]) if brought else noise)


def _room(weights: FloatArray, noise: float) -> float:
    """How far a sum over tokens, or the Euclidean norm of their differences, may be off by rounding.

    Independent errors grow with the root of the number of tokens; four standard deviations of that. The first term is
    for single unlikely tokens, whose errors are ten times the usual and which a short response cannot average out.
    """
    return noise * (10 * float(weights.max()) + 4 * float(np.linalg.norm(weights)))


def _entries(example: Example, store: ReferenceStore | None) -> list[Logps] | None:
    """The store's per-token values of an example, unless its values came with the data or the store lost them."""
    if store is None or example.reference is not None:
        return None
    keys = key_array(example_keys(example))
    return None if store.missing(keys).any() else store.read(keys)


def _disagreement(wrong: list[str], responses: int, brought: bool, store: ReferenceStore | None) -> StoreError:
    shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    hints = []
    if brought:
        hints.append(
            "the log-prob columns in the data may come from another model: "
            "leave them out, or name that model in model.reference"
        )
    if store is not None:
        hints.append(f"delete {store.folder} to have everything scored again")
    return StoreError(
        f"{len(wrong)} of {responses} responses scored again do not agree with the reference values in use.",
        where=shown,
        hint="; or ".join(hints) or "start a new run, which scores the reference again",
    )
