"""The loss of a global batch, its gradient and its metrics, over micro-batches: the same whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dpo_cli.batch.layout import PackedRow, pack, sum_by_response, tokens_by_response
from dpo_cli.batch.transfer import to_device
from dpo_cli.data.example import Example
from dpo_cli.engine.interface import Engine
from dpo_cli.engine.ranks import Ranks, SoleRank, sum_floats
from dpo_cli.errors import NonFiniteError
from dpo_cli.losses.types import Statistic
from dpo_cli.policy.head import TokenScores
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.micro_batch import Indices, MicroBatch, PreferenceData, Sampled
from dpo_cli.train.objective import Objective, ResponseLogps, concatenated

# What every training step and evaluation logs of the policy's distributions: the entropy of the responses that are
# trained on, and how often the most probable token is that of the first response (TRL's mean_token_accuracy).
_LOGGED: frozenset[Statistic] = frozenset({"entropy", "correct"})

# Is shown a micro-batch that was evaluated, and the log-probs of all its responses.
Watch = Callable[[MicroBatch, ResponseLogps], None]


@dataclass(frozen=True)
class StepOutcome:
    """This rank's part of a training step before the weights move: loss (0-d), metrics, size in tokens."""

    loss: Tensor
    metrics: MetricSums
    tokens: int


@dataclass(frozen=True)
class Normalisers:
    """What summed values of the global batch are divided by: those of the data's examples, and of the samples."""

    preferences: float
    samples: float

    @classmethod
    def counts(cls, indices: Indices, sampled: Sequence[Sampled]) -> Normalisers:
        """How many there are, for a loss that is divided by that."""
        return cls(len(indices), sum(len(each.drawn) for each in sampled))


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
    """A policy, an objective, and how the two make a loss of micro-batches, each rank having its share of them.

    policy: the packed model, or what an engine has made of it.
    """

    policy: nn.Module
    objective: Objective
    device: torch.device
    ranks: Ranks = field(default_factory=SoleRank)

    def accumulate_gradient(
        self, micros: Sequence[MicroBatch], engine: Engine, *, step: int = 0, counts: Normalisers | None = None
    ) -> StepOutcome:
        """Forward and backward over the global batch of a step, counted from 0; the weights have not moved yet.

        counts: what the ranks have together, where it is known; else they tell one another.
        """
        metrics, by = MetricSums(), self._normalisers(micros, counts)
        if self._couples:
            loss, tokens = self._coupled(micros, engine, metrics, by)
        else:
            loss, tokens = self._independent(micros, engine, metrics, by, step)
        return StepOutcome(loss=loss, metrics=metrics, tokens=tokens)

    @torch.no_grad()
    def evaluate(
        self,
        data: PreferenceData,
        *,
        global_pairs: int,
        tokens_per_microbatch: int,
        should_stop: Callable[[], bool] = lambda: False,
        watch: Watch | None = None,
    ) -> dict[str, float] | None:
        """Means over a held-out set, in groups of `global_pairs` so that coupled losses mean what they do in training.

        watch: is shown what the policy says of each micro-batch of this rank.
        None when `should_stop` said so before the end.
        """
        metrics, total, normaliser = MetricSums(), torch.zeros((), dtype=torch.float64, device=self.device), 0.0
        for indices in _groups(len(data.examples), global_pairs):
            if should_stop():
                return None
            micros = data.microbatches(indices, tokens_per_microbatch=tokens_per_microbatch, ranks=self.ranks)
            logps, examples = self._batch(micros, metrics, watch)
            if examples and self._counts:
                values = self.objective(logps, examples)
                total += values.values.sum()
                normaliser += self.objective.normaliser(examples)
                self.objective.record(metrics, values, logps, examples)
        total_value, normaliser = sum_floats(self.ranks, float(total), normaliser)
        return {"loss": total_value / normaliser, **metrics.over_ranks(self.ranks).means()}

    @torch.no_grad()
    def starting_point(self, data: PreferenceData, indices: Indices, *, tokens_per_microbatch: int) -> StartingPoint:
        """Compare the policy with its reference before the first step; `data` must have references."""
        micros = data.microbatches(indices, tokens_per_microbatch=tokens_per_microbatch, ranks=self.ranks)
        logps, examples = self._batch(micros, MetricSums())
        loss = expected = normaliser = difference = 0.0
        if examples:
            if logps.reference is None:
                raise ValueError("there is no reference to compare with")
            difference = float(((logps.policy - logps.reference).abs() / logps.tokens.sqrt()).max())
            if self._counts:
                normaliser = self.objective.normaliser(examples)
                loss = float(self.objective(logps, examples).values.sum())
                expected = float(self.objective(replace(logps, reference=logps.policy), examples).values.sum())
        loss, expected, normaliser = sum_floats(self.ranks, loss, expected, normaliser)
        differences = self.ranks.gather(difference)
        # A NaN must not be passed over, as max() may.
        worst = float("nan") if any(map(math.isnan, differences)) else max(differences)
        return StartingPoint(loss=loss / normaliser, expected=expected / normaliser, difference=worst)

    def blame(self, micros: Sequence[MicroBatch], engine: Engine) -> NonFiniteError:
        """Find the rows whose loss or gradient is not finite, one by one; the weights have not moved."""
        engine.forget_gradient()
        alone = [single for micro in micros if not micro.idle for single in micro.alone()]
        # Under partitioned weights every forward pass needs all ranks.
        rounds = max(self.ranks.gather(len(alone)))
        spare = micros[0].alone()[0]
        mine = []
        for number in range(rounds):
            micro = alone[number] if number < len(alone) else spare
            row = pack(micro.examples, first_responses=self.objective.trained_responses)
            logps = self._response_logps(row, micro, MetricSums(), first_responses=self.objective.trained_responses)
            finite = engine.is_finite(self._share(logps, micro, Normalisers(1.0, 1.0), MetricSums(), step=0))
            if not finite and number < len(alone):
                mine.append(micro.examples[0].origin)
        guilty = [origin for origins in self.ranks.gather(mine) for origin in origins]
        rows = ", ".join(guilty[:5]) + (f" and {len(guilty) - 5} more" if len(guilty) > 5 else "")
        return NonFiniteError(
            "The loss or its gradient is not finite; the weights were not moved by this step.",
            where=rows or "no single row: only their sum overflows",
            hint="a lower optimizer.lr, model.dtype=float32, or remove the rows named",
        )

    @property
    def _couples(self) -> bool:
        return self.objective.declaration.couples_batch

    @property
    def _counts(self) -> bool:
        """Whether what `_batch` gave is to be counted here: a coupled loss's batch is whole on every rank."""
        return self.ranks.is_main or not self._couples

    def _normalisers(self, micros: Sequence[MicroBatch], counts: Normalisers | None) -> Normalisers:
        if counts is not None and self.objective.declaration.normaliser == "pairs":
            return counts
        mine = self.objective.normaliser(_examples(micros)), float(sum(_samples(micro) for micro in micros))
        return Normalisers(*sum_floats(self.ranks, *mine))

    def _share(
        self, logps: ResponseLogps, micro: MicroBatch, by: Normalisers, metrics: MetricSums, *, step: int
    ) -> Tensor:
        """This micro-batch's share of the global loss: its pairs' and its samples', each divided by all of theirs."""
        preferences, sampled = logps.split(len(micro.preferences))
        shares = []
        if micro.preferences:
            values = self.objective(preferences, micro.preferences)
            self.objective.record(metrics, values, preferences, micro.preferences)
            shares.append(values.values.sum() / by.preferences)
        if micro.drawn:
            values = self.objective.of_samples(sampled, micro.drawn, step)
            for name, part in values.parts.items():
                metrics.add(name, part)
            shares.append(values.values.sum() / by.samples)
        return shares[0] if len(shares) == 1 else shares[0] + shares[1]

    def _independent(
        self, micros: Sequence[MicroBatch], engine: Engine, metrics: MetricSums, by: Normalisers, step: int
    ) -> tuple[Tensor, int]:
        total, tokens = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for micro in micros:
            row = pack(micro.examples, first_responses=self.objective.trained_responses)
            counted = MetricSums() if micro.idle else metrics
            logps = self._response_logps(row, micro, counted, first_responses=self.objective.trained_responses)
            share = self._share(logps, micro, by, counted, step=step)
            if micro.idle:
                engine.backward(share * 0.0)
                continue
            engine.backward(share)
            total += share.detach()
            tokens += len(row.input_ids)
        return total, tokens

    def _coupled(
        self, micros: Sequence[MicroBatch], engine: Engine, metrics: MetricSums, by: Normalisers
    ) -> tuple[Tensor, int]:
        """A loss that couples the batch sees all of it at once: d loss / d log-probs there, then through each part."""
        with torch.no_grad():
            whole, examples = self._batch(micros, metrics)
        leaf = whole.policy.detach().requires_grad_()
        values = self.objective(replace(whole, policy=leaf), examples)
        loss = values.values.sum() / by.preferences
        (slopes,) = torch.autograd.grad(loss, leaf)
        if self._counts:
            self.objective.record(metrics, values, whole, examples)

        before = sum(self.ranks.gather(_responses(micros))[: self.ranks.rank])
        tokens, start, first = 0, before, self.objective.trained_responses
        for micro in micros:
            row = pack(micro.examples, first_responses=first).to(self.device)
            logps = sum_by_response(row, self.policy(row).logps)
            if micro.idle:
                engine.backward(logps.sum() * 0.0)
                continue
            counts = [len(example.responses) for example in micro.examples]
            stop = start + sum(counts)
            trained = torch.cat([part[:first] for part in slopes[start:stop].split(counts)])
            start = stop
            engine.backward((logps * trained).sum())
            tokens += len(row.input_ids)
        # Every rank knows the whole loss; their sum must be it.
        return loss.detach() if self._counts else torch.zeros_like(loss), tokens

    @torch.no_grad()
    def _batch(
        self, micros: Sequence[MicroBatch], metrics: MetricSums, watch: Watch | None = None
    ) -> tuple[ResponseLogps, list[Example]]:
        """All responses of this rank's micro-batches, without gradient; of all ranks' where the loss couples them."""
        parts = []
        for micro in micros:
            row = pack(micro.examples)
            part = self._response_logps(row, micro, MetricSums() if micro.idle else metrics, first_responses=None)
            if not micro.idle:
                parts.append(part)
                if watch is not None:
                    watch(micro, part)
        examples = _examples(micros)
        if self._couples and self.ranks.size > 1:
            told = self.ranks.gather(([part.to(torch.device("cpu")) for part in parts], examples))
            parts = [part.to(self.device) for others, _ in told for part in others]
            examples = [example for _, others in told for example in others]
        return concatenated(parts, self.device), examples

    def _response_logps(
        self, row: PackedRow, micro: MicroBatch, metrics: MetricSums, *, first_responses: int | None
    ) -> ResponseLogps:
        row = row.to(self.device)
        declared = self.objective.declaration.statistics
        scores: TokenScores = self.policy(row, _LOGGED | declared)
        firsts = _of_first_responses(row)
        # A response borrowed from another prompt, or one that is only evaluated, is no example of what is being learnt;
        # what the policy wrote is no example of the data.
        learnt = None if self.objective.trained_responses is None else firsts
        if micro.drawn:
            learnt = row.response_of_token < sum(row.responses_per_example[: len(micro.preferences)])
            firsts &= learnt
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
    return [example for micro in micros if not micro.idle for example in micro.preferences]


def _samples(micro: MicroBatch) -> int:
    return sum(map(len, micro.drawn))


def _responses(micros: Sequence[MicroBatch]) -> int:
    return sum(len(example.responses) for example in _examples(micros))


def _of_first_responses(row: PackedRow) -> Tensor:
    """(R,) True for the tokens of each example's first response: the chosen, the best, the one to imitate."""
    counts = torch.tensor(row.responses_per_example)
    first = torch.zeros(row.responses, dtype=torch.bool)
    first[counts.cumsum(0) - counts] = True
    return to_device(first, row.response_of_token.device)[row.response_of_token]


def _groups(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
