"""The loss of a global batch, its gradient and its metrics, over micro-batches: the same whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpo_cli.batch.layout import PackedRow, pack, sum_by_response, tokens_by_response
from dpo_cli.data.example import Example
from dpo_cli.engine.single_device import SingleDeviceEngine
from dpo_cli.errors import NonFiniteError
from dpo_cli.losses.types import Statistic
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.micro_batch import Indices, MicroBatch, PreferenceData
from dpo_cli.train.objective import Objective, ResponseLogps

# What every training step and evaluation logs of the policy's distributions: the entropy of the responses that are
# trained on, and how often the most probable token is that of the first response (TRL's mean_token_accuracy).
_LOGGED: frozenset[Statistic] = frozenset({"entropy", "correct"})


@dataclass(frozen=True)
class StepOutcome:
    """What a training step leaves to be decided: its loss and gradient norm (0-d), its metrics, its size in tokens."""

    loss: Tensor
    gradient_norm: Tensor
    metrics: MetricSums
    tokens: int


@dataclass(frozen=True)
class StartingPoint:
    """The first batch before the first step.

    loss: as the policy stands. expected: what it would be if the policy equalled its reference.
    difference: the largest |policy - reference| of a response's log-prob, over the square root of its tokens, in nats.
    """

    loss: float
    expected: float
    difference: float


@dataclass(frozen=True)
class BatchLoss:
    """A policy, an objective, and how the two make a loss of micro-batches."""

    policy: PackedModel
    objective: Objective
    device: torch.device

    def accumulate_gradient(self, micros: Sequence[MicroBatch], engine: SingleDeviceEngine) -> StepOutcome:
        """Forward and backward over a global batch; the weights have not moved yet."""
        metrics = MetricSums()
        normaliser = self.objective.normaliser(_examples(micros))
        backward = self._coupled if self.objective.declaration.couples_batch else self._independent
        loss, tokens = backward(micros, engine, normaliser, metrics)
        metrics.add("loss", loss)
        return StepOutcome(loss=loss, gradient_norm=engine.gradient_norm(), metrics=metrics, tokens=tokens)

    @torch.no_grad()
    def evaluate(
        self,
        data: PreferenceData,
        *,
        global_pairs: int,
        tokens_per_microbatch: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Means over a held-out set, in groups of `global_pairs` so that coupled losses mean what they do in training.

        None when `should_stop` said so before the end.
        """
        metrics, total, normaliser = MetricSums(), torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        for indices in _groups(len(data.examples), global_pairs):
            if should_stop():
                return None
            micros = data.microbatches(indices, tokens_per_microbatch=tokens_per_microbatch)
            examples = _examples(micros)
            whole = self._whole_batch(micros, metrics)
            values = self.objective(whole, examples)
            total += values.values.sum()
            normaliser += self.objective.normaliser(examples)
            self.objective.record(metrics, values, whole, examples)
        return {"loss": float(total) / normaliser, **metrics.means()}

    @torch.no_grad()
    def starting_point(self, data: PreferenceData, indices: Indices, *, tokens_per_microbatch: int) -> StartingPoint:
        """Compare the policy with its reference before the first step; `data` must have references."""
        micros = data.microbatches(indices, tokens_per_microbatch=tokens_per_microbatch)
        examples = _examples(micros)
        whole = self._whole_batch(micros, MetricSums())
        if whole.reference is None:
            raise ValueError("there is no reference to compare with")
        normaliser = self.objective.normaliser(examples)
        loss, expected = (
            float(self.objective(logps, examples).values.sum()) / normaliser
            for logps in (whole, replace(whole, reference=whole.policy))
        )
        differences = (whole.policy - whole.reference).abs() / whole.tokens.sqrt()
        return StartingPoint(loss=loss, expected=expected, difference=float(differences.max()))

    def blame(self, micros: Sequence[MicroBatch], engine: SingleDeviceEngine) -> NonFiniteError:
        """Find the rows whose loss or gradient is not finite, one by one; the weights have not moved."""
        engine.forget_gradient()
        guilty = []
        for micro in (alone for together in micros for alone in together.alone()):
            outcome = self.accumulate_gradient([micro], engine)
            if not torch.isfinite(torch.stack((outcome.loss, outcome.gradient_norm.double()))).all():
                guilty.append(micro.examples[0].origin)
            engine.forget_gradient()
        rows = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
        return NonFiniteError(
            "The loss or its gradient is not finite; the weights were not moved by this step.",
            where=rows or "no single row: only their sum overflows",
            hint="a lower optimizer.lr, model.dtype=float32, or remove the rows named",
        )

    def _independent(
        self, micros: Sequence[MicroBatch], engine: SingleDeviceEngine, normaliser: float, metrics: MetricSums
    ) -> tuple[Tensor, int]:
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for micro in micros:
            row = pack(micro.examples, first_responses=self.objective.trained_responses)
            logps = self._response_logps(row, micro, metrics, first_responses=self.objective.trained_responses)
            values = self.objective(logps, micro.examples)
            share = values.values.sum() / normaliser
            engine.backward(share)
            total += share.detach()
            tokens += len(row.input_ids)
            self.objective.record(metrics, values, logps, micro.examples)
        return total, tokens

    def _coupled(
        self, micros: Sequence[MicroBatch], engine: SingleDeviceEngine, normaliser: float, metrics: MetricSums
    ) -> tuple[Tensor, int]:
        """A loss that couples the batch sees all of it at once: d loss / d log-probs there, then through each part."""
        examples = _examples(micros)
        whole = self._whole_batch(micros, metrics)
        leaf = whole.policy.detach().requires_grad_()
        values = self.objective(replace(whole, policy=leaf), examples)
        loss = values.values.sum() / normaliser
        (slopes,) = torch.autograd.grad(loss, leaf)
        self.objective.record(metrics, values, whole, examples)

        tokens, start, first = 0, 0, self.objective.trained_responses
        for micro in micros:
            counts = [len(example.responses) for example in micro.examples]
            stop = start + sum(counts)
            trained = torch.cat([part[:first] for part in slopes[start:stop].split(counts)])
            start = stop
            row = pack(micro.examples, first_responses=first).to(self.device)
            engine.backward((sum_by_response(row, self.policy(row).logps) * trained).sum())
            tokens += len(row.input_ids)
        return loss.detach(), tokens

    @torch.no_grad()
    def _whole_batch(self, micros: Sequence[MicroBatch], metrics: MetricSums) -> ResponseLogps:
        """All responses of all micro-batches, without gradient."""
        parts = [self._response_logps(pack(micro.examples), micro, metrics, first_responses=None) for micro in micros]
        references = [part.reference for part in parts if part.reference is not None]
        return ResponseLogps(
            policy=torch.cat([part.policy for part in parts]),
            reference=torch.cat(references) if references else None,
            tokens=torch.cat([part.tokens for part in parts]),
            per_example=tuple(count for part in parts for count in part.per_example),
            statistics={
                name: torch.cat([part.statistics[name] for part in parts])
                for name in self.objective.declaration.statistics
            },
        )

    def _response_logps(
        self, row: PackedRow, micro: MicroBatch, metrics: MetricSums, *, first_responses: int | None
    ) -> ResponseLogps:
        row = row.to(self.device)
        declared = self.objective.declaration.statistics
        scores = self.policy(row, _LOGGED | declared)
        firsts = _of_first_responses(row)
        # A response borrowed from another prompt, or one that is only evaluated, is no example of what is being learnt.
        learnt = None if self.objective.trained_responses is None else firsts
        metrics.add("entropy", scores.statistics["entropy"], learnt)
        metrics.add("mean_token_accuracy", scores.statistics["correct"], firsts)
        return ResponseLogps(
            policy=sum_by_response(row, scores.logps),
            reference=micro.reference(first_responses, self.device),
            tokens=tokens_by_response(row),
            per_example=row.responses_per_example,
            statistics={name: sum_by_response(row, scores.statistics[name]) for name in declared},
        )


def _examples(micros: Sequence[MicroBatch]) -> list[Example]:
    return [example for micro in micros for example in micro.examples]


def _of_first_responses(row: PackedRow) -> Tensor:
    """(R,) True for the tokens of each example's first response: the chosen, the best, the one to imitate."""
    counts = torch.tensor(row.responses_per_example)
    first = torch.zeros(row.responses, dtype=torch.bool)
    first[counts.cumsum(0) - counts] = True
    return first.to(row.response_of_token.device, non_blocking=True)[row.response_of_token]


def _groups(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
