"""From per-response log-probs to a loss and its metrics: the only place that knows every kind of example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo_cli.batch.transfer import to_device
from dpo_cli.data.example import Example
from dpo_cli.losses.types import (
    Declaration,
    DemonstrationLogps,
    LossInput,
    LossValues,
    PairLogps,
    RankedLogps,
    SampleLogps,
    Statistics,
    UnpairedLogps,
    as_loss_values,
    declaration_of,
)
from dpo_cli.train.metric_sums import MetricSums


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probs of the N responses of some examples, each (N,) float64, example after example.

    policy, reference: weighted sums over tokens in nats; reference is None where the loss needs none.
    tokens: the tokens of each, or the sums of their weights.
    per_example: N split by example.
    statistics: sums over tokens of what the loss declared, each (N,).
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor
    per_example: tuple[int, ...]
    statistics: Statistics = field(default_factory=dict)

    def to(self, device: torch.device) -> ResponseLogps:
        return ResponseLogps(
            policy=self.policy.to(device),
            reference=None if self.reference is None else self.reference.to(device),
            tokens=self.tokens.to(device),
            per_example=self.per_example,
            statistics={name: sums.to(device) for name, sums in self.statistics.items()},
        )

    def split(self, examples: int) -> tuple[ResponseLogps, ResponseLogps]:
        """The responses of the first so many examples, and of the others."""
        at = sum(self.per_example[:examples])
        return self._part(slice(None, at), slice(None, examples)), self._part(slice(at, None), slice(examples, None))

    def _part(self, responses: slice, examples: slice) -> ResponseLogps:
        return ResponseLogps(
            policy=self.policy[responses],
            reference=None if self.reference is None else self.reference[responses],
            tokens=self.tokens[responses],
            per_example=self.per_example[examples],
            statistics={name: sums[responses] for name, sums in self.statistics.items()},
        )


def concatenated(parts: Sequence[ResponseLogps], device: torch.device) -> ResponseLogps:
    """The responses of all parts, in their order; of no parts, none."""
    nothing = torch.zeros(0, dtype=torch.float64, device=device)
    references = [part.reference for part in parts if part.reference is not None]
    names = parts[0].statistics if parts else {}
    return ResponseLogps(
        policy=torch.cat([nothing, *(part.policy for part in parts)]),
        reference=torch.cat(references) if references else None,
        tokens=torch.cat([nothing, *(part.tokens for part in parts)]),
        per_example=tuple(count for part in parts for count in part.per_example),
        statistics={name: torch.cat([part.statistics[name] for part in parts]) for name in names},
    )


@dataclass(frozen=True)
class Objective:
    """A loss with its parameters bound, and what it declares about itself."""

    loss: Callable[[LossInput], LossValues]
    declaration: Declaration

    @classmethod
    def of(cls, loss: Callable[[LossInput], LossValues]) -> Objective:
        return cls(loss=loss, declaration=declaration_of(loss))

    @property
    def trained_responses(self) -> int | None:
        """How many responses of an example carry gradient (None: all of them)."""
        return 1 if self.declaration.kind in ("demonstration", "unpaired") else None

    def normaliser(self, examples: Sequence[Example]) -> float:
        """What the summed loss values of a global batch are divided by."""
        if self.declaration.normaliser == "pairs":
            return float(len(examples))
        return sum(_trained_tokens(example, self.trained_responses) for example in examples)

    def __call__(self, logps: ResponseLogps, examples: Sequence[Example]) -> LossValues:
        """Unreduced values, (examples,)."""
        return as_loss_values(self.loss(self._loss_input(logps, examples)), len(examples))

    def of_samples(self, logps: ResponseLogps, drawn: Sequence[Sequence[int]], step: int) -> LossValues:
        """Unreduced values of what the policy wrote, (samples,).

        logps: of prompts of the generator. drawn: as `Sampled.drawn`, for each prompt. step: counted from 0.
        """
        samples = _samples(logps, drawn, step)
        return as_loss_values(self.loss(samples), len(samples.policy))

    def _loss_input(self, logps: ResponseLogps, examples: Sequence[Example]) -> LossInput:
        policy, reference, tokens = logps.policy, logps.reference, logps.tokens
        kind = self.declaration.kind
        if kind == "ranked":
            return _ranked(logps)
        if kind == "demonstration":
            # Examples may bring worse responses along for evaluation; the first is the one to imitate.
            starts = _starts(logps.per_example, policy.device)
            return DemonstrationLogps(
                policy=policy[starts], tokens=tokens[starts], statistics=_each(logps.statistics, lambda x: x[starts])
            )
        if kind == "unpaired":
            return UnpairedLogps(
                policy=policy[0::2],
                reference=None if reference is None else reference[0::2],
                tokens=tokens[0::2],
                desirable=_desirable(examples, policy.device),
                kl_policy=policy[1::2],
                kl_reference=None if reference is None else reference[1::2],
                statistics=_each(logps.statistics, lambda x: x[0::2]),
            )
        return PairLogps(
            policy_chosen=policy[0::2],
            policy_rejected=policy[1::2],
            reference_chosen=None if reference is None else reference[0::2],
            reference_rejected=None if reference is None else reference[1::2],
            chosen_tokens=tokens[0::2],
            rejected_tokens=tokens[1::2],
            statistics=_each(logps.statistics, lambda x: x.view(-1, 2)),
        )

    def record(self, sums: MetricSums, values: LossValues, logps: ResponseLogps, examples: Sequence[Example]) -> None:
        """Add the metrics of these examples under TRL's names."""
        for name, part in values.parts.items():
            sums.add(name, part)
        kind, policy, rewards = self.declaration.kind, logps.policy, values.rewards
        if kind == "unpaired":
            desirable = _desirable(examples, policy.device)
            for side, where in (("chosen", desirable), ("rejected", ~desirable)):
                if isinstance(rewards, Tensor):
                    sums.add(f"rewards/{side}", rewards, where)
                sums.add(f"logps/{side}", policy[0::2], where)
            return
        starts = _starts(logps.per_example, policy.device)
        lasts = starts + to_device(torch.tensor(logps.per_example), policy.device) - 1
        if isinstance(rewards, Tensor) and rewards.ndim == 2:
            rewards = (rewards[:, 0], rewards.gather(1, (lasts - starts)[:, None])[:, 0])
        if isinstance(rewards, tuple):
            chosen, rejected = rewards
            sums.add("rewards/chosen", chosen)
            sums.add("rewards/rejected", rejected)
            sums.add("rewards/accuracies", chosen > rejected)
            sums.add("rewards/margins", chosen - rejected)
        sums.add("logps/chosen", policy[starts])
        sums.add("logps/rejected", policy[lasts], where=lasts > starts)


def _desirable(examples: Sequence[Example], device: torch.device) -> Tensor:
    return to_device(torch.tensor([bool(example.desirable) for example in examples]), device)


def _starts(per_example: Sequence[int], device: torch.device) -> Tensor:
    counts = torch.tensor(per_example)
    return to_device(counts.cumsum(0) - counts, device)


def _ranked(logps: ResponseLogps) -> RankedLogps:
    counts = to_device(torch.tensor(logps.per_example), logps.policy.device)
    places = torch.arange(max(logps.per_example), device=counts.device)
    present = places < counts[:, None]
    flat = (_starts(logps.per_example, counts.device)[:, None] + places).clamp(max=len(logps.policy) - 1)
    return RankedLogps(
        policy=logps.policy[flat],
        reference=None if logps.reference is None else logps.reference[flat],
        tokens=logps.tokens[flat],
        present=present,
        statistics=_each(logps.statistics, lambda x: x[flat]),
    )


def _samples(logps: ResponseLogps, drawn: Sequence[Sequence[int]], step: int) -> SampleLogps:
    """The first response of a prompt is its truth. A sample that repeats it is compared with itself."""
    device = logps.policy.device
    starts = list(itertools.accumulate(logps.per_example[:-1], initial=0))
    counts = torch.tensor([len(places) for places in drawn])
    where = torch.tensor([start + place for start, places in zip(starts, drawn, strict=True) for place in places])
    prompts = torch.arange(len(drawn)).repeat_interleave(counts)
    truths = to_device(torch.tensor(starts)[prompts], device)
    where, prompts = to_device(where, device), to_device(prompts, device)
    return SampleLogps(
        policy=logps.policy[where],
        reference=None if logps.reference is None else logps.reference[where],
        tokens=logps.tokens[where],
        truth_policy=logps.policy.detach()[truths],
        truth_reference=None if logps.reference is None else logps.reference[truths],
        prompt=prompts,
        step=step,
    )


def _each(statistics: Statistics, select: Callable[[Tensor], Tensor]) -> Statistics:
    return {name: select(sums) for name, sums in statistics.items()}


def _trained_tokens(example: Example, trained_responses: int | None) -> float:
    if example.weights is None:
        return float(sum(map(len, example.responses[:trained_responses])))
    return float(sum(weights.sum() for weights in example.weights[:trained_responses]))
