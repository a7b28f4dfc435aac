"""One optimiser step, and one evaluation, over micro-batches: the same mathematics whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.batch.layout import PackedRow, pack, sum_by_response, tokens_by_response
from dpo_cli.batch.plan import microbatches
from dpo_cli.data.example import Example, Examples
from dpo_cli.engine.single_device import SingleDeviceEngine
from dpo_cli.errors import NonFiniteError
from dpo_cli.losses.types import Statistic
from dpo_cli.policy.head import TokenScores
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.objective import Objective, ResponseLogps

Scorer = Callable[[PackedRow, frozenset[Statistic]], TokenScores]
# What every training step and evaluation logs of the policy's distributions: the entropy of the responses that are
# trained on, and how often the most probable token is that of the first response (TRL's mean_token_accuracy).
_LOGGED: frozenset[Statistic] = frozenset({"entropy", "correct"})
Indices = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together, with their references: (K,) float64 each, None if none is needed."""

    examples: tuple[Example, ...]
    references: tuple[np.ndarray, ...] | None

    def reference(self, first_responses: int | None, device: torch.device) -> Tensor | None:
        if self.references is None:
            return None
        return torch.from_numpy(np.concatenate([sums[:first_responses] for sums in self.references])).to(device)


@dataclass(frozen=True)
class PreferenceData:
    """Examples with what the reference says of them."""

    examples: Examples
    reference: ReferenceSums | None

    def microbatches(self, indices: Indices, *, tokens_per_microbatch: int) -> list[MicroBatch]:
        """Cut these examples into micro-batches that fit the token budget."""
        plan = microbatches([int(self.examples.sizes[i]) for i in indices], tokens_per_microbatch=tokens_per_microbatch)
        return [
            MicroBatch(
                examples=tuple(self.examples[int(indices[place])] for place in places),
                references=None
                if self.reference is None
                else tuple(self.reference.of(int(indices[place])) for place in places),
            )
            for places in plan
        ]


@dataclass(frozen=True)
class StepOutcome:
    """What a training step leaves to be decided: its loss and gradient norm (0-d), its metrics, its size in tokens."""

    loss: Tensor
    gradient_norm: Tensor
    metrics: MetricSums
    tokens: int


def accumulate_gradient(
    micros: Sequence[MicroBatch], score: Scorer, objective: Objective, engine: SingleDeviceEngine, device: torch.device
) -> StepOutcome:
    """Forward and backward over a global batch; the weights have not moved yet."""
    metrics = MetricSums()
    normaliser = objective.normaliser([example for micro in micros for example in micro.examples])
    run = _coupled_backward if objective.declaration.couples_batch else _independent_backward
    loss, tokens = run(micros, score, objective, engine, device, normaliser, metrics)
    metrics.add("loss", loss)
    return StepOutcome(loss=loss, gradient_norm=engine.gradient_norm(), metrics=metrics, tokens=tokens)


def _independent_backward(
    micros: Sequence[MicroBatch],
    score: Scorer,
    objective: Objective,
    engine: SingleDeviceEngine,
    device: torch.device,
    normaliser: float,
    metrics: MetricSums,
) -> tuple[Tensor, int]:
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for micro in micros:
        row = pack(micro.examples, first_responses=objective.trained_responses)
        logps = _response_logps(row, micro, score, objective, objective.trained_responses, device, metrics)
        values = objective(logps, micro.examples)
        share = values.values.sum() / normaliser
        engine.backward(share)
        total += share.detach()
        tokens += len(row.input_ids)
        objective.record(metrics, values, logps, micro.examples)
    return total, tokens


def _coupled_backward(
    micros: Sequence[MicroBatch],
    score: Scorer,
    objective: Objective,
    engine: SingleDeviceEngine,
    device: torch.device,
    normaliser: float,
    metrics: MetricSums,
) -> tuple[Tensor, int]:
    """A loss that couples the batch sees all of it at once: d loss / d log-probs there, then back through each part."""
    examples = [example for micro in micros for example in micro.examples]
    whole = _whole_batch(micros, score, objective, device, metrics)
    leaf = whole.policy.detach().requires_grad_()
    values = objective(replace(whole, policy=leaf), examples)
    loss = values.values.sum() / normaliser
    (slopes,) = torch.autograd.grad(loss, leaf)
    objective.record(metrics, values, whole, examples)

    tokens, start, first = 0, 0, objective.trained_responses
    for micro in micros:
        counts = [len(example.responses) for example in micro.examples]
        stop = start + sum(counts)
        trained = torch.cat([part[:first] for part in slopes[start:stop].split(counts)])
        start = stop
        row = pack(micro.examples, first_responses=first)
        engine.backward((sum_by_response(row.to(device), score(row, frozenset()).logps) * trained).sum())
        tokens += len(row.input_ids)
    return loss.detach(), tokens


@torch.no_grad()
def _whole_batch(
    micros: Sequence[MicroBatch], score: Scorer, objective: Objective, device: torch.device, metrics: MetricSums
) -> ResponseLogps:
    """All responses of all micro-batches, without gradient."""
    parts = [_response_logps(pack(micro.examples), micro, score, objective, None, device, metrics) for micro in micros]
    references = [part.reference for part in parts if part.reference is not None]
    return ResponseLogps(
        policy=torch.cat([part.policy for part in parts]),
        reference=torch.cat(references) if references else None,
        tokens=torch.cat([part.tokens for part in parts]),
        per_example=tuple(count for part in parts for count in part.per_example),
        statistics={
            name: torch.cat([part.statistics[name] for part in parts]) for name in objective.declaration.statistics
        },
    )


def _response_logps(
    row: PackedRow,
    micro: MicroBatch,
    score: Scorer,
    objective: Objective,
    first_responses: int | None,
    device: torch.device,
    metrics: MetricSums,
) -> ResponseLogps:
    row = row.to(device)
    declared = objective.declaration.statistics
    scores = score(row, _LOGGED | declared)
    firsts = _of_first_responses(row)
    # A response borrowed from another prompt, or one that is only evaluated, is no example of what is being learnt.
    metrics.add("entropy", scores.statistics["entropy"], None if objective.trained_responses is None else firsts)
    metrics.add("mean_token_accuracy", scores.statistics["correct"], firsts)
    return ResponseLogps(
        policy=sum_by_response(row, scores.logps),
        reference=micro.reference(first_responses, device),
        tokens=tokens_by_response(row),
        per_example=row.responses_per_example,
        statistics={name: sum_by_response(row, scores.statistics[name]) for name in declared},
    )


def _of_first_responses(row: PackedRow) -> Tensor:
    """(R,) True for the tokens of each example's first response: the chosen, the best, the one to imitate."""
    counts = torch.tensor(row.responses_per_example)
    first = torch.zeros(row.responses, dtype=torch.bool)
    first[counts.cumsum(0) - counts] = True
    return first.to(row.response_of_token.device, non_blocking=True)[row.response_of_token]


@torch.no_grad()
def evaluate(
    data: PreferenceData,
    score: Scorer,
    objective: Objective,
    *,
    global_pairs: int,
    tokens_per_microbatch: int,
    device: torch.device,
) -> dict[str, float]:
    """Means over a held-out set, in groups of `global_pairs` so that coupled losses mean what they do in training."""
    metrics, total, normaliser = MetricSums(), torch.zeros((), dtype=torch.float64, device=device), 0.0
    for indices in _groups(len(data.examples), global_pairs):
        micros = data.microbatches(indices, tokens_per_microbatch=tokens_per_microbatch)
        examples = [example for micro in micros for example in micro.examples]
        whole = _whole_batch(micros, score, objective, device, metrics)
        values = objective(whole, examples)
        total += values.values.sum()
        normaliser += objective.normaliser(examples)
        objective.record(metrics, values, whole, examples)
    return {"loss": float(total) / normaliser, **metrics.means()}


@torch.no_grad()
def starting_loss(
    data: PreferenceData,
    score: Scorer,
    objective: Objective,
    indices: Indices,
    *,
    tokens_per_microbatch: int,
    device: torch.device,
) -> tuple[float, float]:
    """The loss of some examples as the policy stands, and what it would be if the policy equalled its reference."""
    micros = data.microbatches(indices, tokens_per_microbatch=tokens_per_microbatch)
    examples = [example for micro in micros for example in micro.examples]
    whole = _whole_batch(micros, score, objective, device, MetricSums())
    at_reference = replace(whole, reference=whole.policy)
    normaliser = objective.normaliser(examples)
    found, expected = (float(objective(logps, examples).values.sum()) / normaliser for logps in (whole, at_reference))
    return found, expected


def _groups(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def blame_non_finite(
    micros: Sequence[MicroBatch], score: Scorer, objective: Objective, engine: SingleDeviceEngine, device: torch.device
) -> NonFiniteError:
    """Find the rows whose loss or gradient is not finite, one by one; the weights have not moved."""
    engine.forget_gradient()
    guilty = []
    for micro in micros:
        for place, example in enumerate(micro.examples):
            references = None if micro.references is None else (micro.references[place],)
            alone = MicroBatch(examples=(example,), references=references)
            outcome = accumulate_gradient([alone], score, objective, engine, device)
            if not torch.isfinite(torch.stack((outcome.loss, outcome.gradient_norm.double()))).all():
                guilty.append(example.origin)
            engine.forget_gradient()
    rows = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
    return NonFiniteError(
        "The loss or its gradient is not finite; the weights were not moved by this step.",
        where=rows or "no single row: only their sum overflows",
        hint="a lower optimizer.lr, model.dtype=float32, or remove the rows named",
    )
