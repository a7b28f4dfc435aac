"""The policy as its own generator: what it writes to prompts, and what the reference says of that.

round      every rollout.refresh_every steps: the prompts of all steps until the next one are answered at once,
           by the policy as it is then, each rank answering its share
buffer     answers that wait for their step; a checkpoint holds them, so a resumed run goes on with the same
batch      what one step learns from: prompts with their truth and the answers that ended
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.batch.order import cycled_batch
from dpo_cli.batch.plan import shares
from dpo_cli.batch.transfer import to_device
from dpo_cli.data.example import Example, Examples, IntArray
from dpo_cli.engine.interface import SavedTensor
from dpo_cli.engine.ranks import Ranks
from dpo_cli.reference.shards import Logps
from dpo_cli.reference.sums import ReferenceSums, weighted_sum
from dpo_cli.rollout.noise import stream
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.metrics_log import MetricsLog
from dpo_cli.train.micro_batch import Sampled, first_places

# The group of a checkpoint that holds answers waiting for their step.
BUFFER = "rollout"

# Answers to prompts, each with its stream of random numbers, and the truths, which only help to be quick: for every
# prompt, its samples.
Respond = Callable[[Sequence[IntArray], Sequence[int], Sequence[IntArray]], list[list[IntArray]]]
# Log-probs under the reference, as `reference.score.Score`; all ranks call it equally often.
Score = Callable[[Sequence[Example]], Sequence[Sequence[Logps]]]


@dataclass(frozen=True)
class GeneratorSettings:
    """What decides which prompts are answered when, and which answers count; see conf/config.yaml, `rollout`."""

    seed: int
    total_steps: int
    prompts_per_step: int
    refresh_every: int
    keep_cut: bool
    tokens_per_microbatch: int
    shown_per_step: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True)
class GeneratorBatch:
    """What a step learns from, and what there is to say of it; the same on every rank but for the metrics."""

    sampled: tuple[Sampled, ...]
    metrics: MetricSums


@dataclass(frozen=True)
class _Answer:
    """What was written to one prompt, whose place among the truths is `prompt`.

    drawn_at: the step at which. reference: (samples,) sums, NaN where unscored.
    """

    prompt: int
    truth: Example
    drawn_at: int
    samples: tuple[IntArray, ...]
    reference: NDArray[np.float64]

    @property
    def said(self) -> tuple[IntArray, ...]:
        """The truth, whose reference is known, and the samples; of a trained policy's, many repeat the truth."""
        return (self.truth.responses[0], *self.samples)

    def question(self, places: Sequence[int]) -> Example:
        """The prompt with the samples at these places."""
        return Example(self.truth.prompt, tuple(self.samples[place] for place in places), origin=self.truth.origin)


@dataclass
class Generator:
    """truths: prompts with their ground truth; reference: of these truths.

    respond: the policy as it is now. score: the reference. decode: token ids as text, for `log`.
    """

    settings: GeneratorSettings
    truths: Examples
    reference: ReferenceSums
    ranks: Ranks
    device: torch.device
    respond: Respond
    score: Score
    decode: Callable[[list[int]], str]
    log: MetricsLog

    def __post_init__(self) -> None:
        self._waiting: dict[int, list[_Answer]] = {}

    def batch(self, step: int) -> GeneratorBatch:
        """What step `step` (counted from 0) learns from; the policy writes now unless it has written for this step.

        All ranks call this together.
        """
        if step not in self._waiting:
            self._waiting = self._round(step)
        answers = self._waiting.pop(step)
        metrics = MetricSums()
        if self.ranks.is_main:
            self._count(answers, step, metrics)
            self._show(answers, step)
        kept = (self._kept(answer) for answer in answers)
        return GeneratorBatch(tuple(self._sampled(answer) for answer in kept if answer.samples), metrics)

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """The answers that wait for their step; the main rank's, as all have the same."""
        if not self._waiting or not self.ranks.is_main:
            return
        rows = [(step, answer) for step, answers in self._waiting.items() for answer in answers]
        samples = [sample for _, answer in rows for sample in answer.samples]
        tensors = {
            "rows": np.array([(step, a.prompt, a.drawn_at, len(a.samples)) for step, a in rows], dtype=np.int64),
            "lengths": np.array([len(sample) for sample in samples], dtype=np.int64),
            "ids": np.concatenate(samples).astype(np.int64),
            "reference": np.concatenate([answer.reference for _, answer in rows]),
        }
        for name, values in tensors.items():
            yield SavedTensor(BUFFER, name, torch.from_numpy(values))

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `saved_tensors` were; of nothing, nothing waits."""
        self._waiting = {}
        if not saved:
            return
        ids, reference = saved["ids"].numpy().astype(np.int32), saved["reference"].numpy()
        ends = saved["lengths"].cumsum(0).tolist()
        samples = [ids[end - length : end] for end, length in zip(ends, saved["lengths"].tolist(), strict=True)]
        start = 0
        for step, prompt, drawn_at, count in saved["rows"].tolist():
            stop = start + count
            answer = _Answer(prompt, self.truths[prompt], drawn_at, tuple(samples[start:stop]), reference[start:stop])
            self._waiting.setdefault(step, []).append(answer)
            start = stop

    def _round(self, now: int) -> dict[int, list[_Answer]]:
        """Answer the prompts of the steps from `now` to the next round, on all ranks."""
        settings, ranks = self.settings, self.ranks
        steps = range(now, min(now + settings.refresh_every, settings.total_steps))
        asked = [
            (step, place, int(prompt))
            for step in steps
            for place, prompt in enumerate(
                cycled_batch(step, seed=settings.seed, examples=len(self.truths), size=settings.prompts_per_step)
            )
        ]
        truths = [self.truths[prompt] for *_, prompt in asked]
        # Long prompts and short ones on every rank, so that none waits long for the others.
        mine = sorted(range(len(asked)), key=lambda at: (-len(truths[at].prompt), at))
        mine = mine[ranks.rank :: ranks.size]
        written = self.respond(
            [truths[at].prompt for at in mine],
            [stream(settings.seed, *asked[at][:2]) for at in mine],
            [truths[at].responses[0] for at in mine],
        )
        told = {
            at: samples for part in ranks.gather(dict(zip(mine, written, strict=True))) for at, samples in part.items()
        }
        answers = [
            _Answer(prompt, truth, now, tuple(told[at]), np.full(len(told[at]), np.nan))
            for at, ((*_, prompt), truth) in enumerate(zip(asked, truths, strict=True))
        ]
        waiting: dict[int, list[_Answer]] = {step: [] for step in steps}
        for (step, *_), answer in zip(asked, self._scored(answers), strict=True):
            waiting[step].append(answer)
        return waiting

    def _scored(self, answers: Sequence[_Answer]) -> list[_Answer]:
        """With the reference's log-probs of the samples that count; of what is said twice they are asked for once."""
        unscored = [self._unscored(answer) for answer in answers]
        each = list(enumerate(zip(answers, unscored, strict=True)))
        told = self._asked_of_reference({at: answer.question(places) for at, (answer, places) in each if places})
        scored = []
        for at, (answer, places) in each:
            reference = np.concatenate([self.reference.of(answer.prompt), answer.reference])
            reference[[1 + place for place in places]] = told.get(at, [])
            scored.append(replace(answer, reference=reference[first_places(answer.said)][1:]))
        return scored

    def _asked_of_reference(self, questions: Mapping[int, Example]) -> dict[int, list[float]]:
        """Each question's sums, response by response; all ranks ask the same, and each scores its share."""
        if not questions:
            return {}
        places = list(questions)
        sizes = [questions[at].packed_tokens for at in places]
        budget = self.settings.tokens_per_microbatch
        mine: dict[int, list[float]] = {}
        for share in shares(sizes, tokens_per_microbatch=budget, rank=self.ranks.rank, ranks=self.ranks.size):
            together = [places[at] for at in share.places]
            logps = self.score([questions[at] for at in together])
            if not share.idle:
                mine.update(
                    (at, [weighted_sum(each, None) for each in scored])
                    for at, scored in zip(together, logps, strict=True)
                )
        return {at: sums for part in self.ranks.gather(mine) for at, sums in part.items()}

    def _unscored(self, answer: _Answer) -> list[int]:
        """The places of the samples that count and repeat nothing said before."""
        first = first_places(answer.said)
        return [place for place in self._counts(answer) if first[1 + place] == 1 + place]

    def _counts(self, answer: _Answer) -> list[int]:
        """The places of the samples that count."""
        return [place for place, ids in enumerate(answer.samples) if self.settings.keep_cut or self._ended(ids)]

    def _kept(self, answer: _Answer) -> _Answer:
        """The answer with the samples that count."""
        counts = self._counts(answer)
        return replace(
            answer, samples=tuple(answer.samples[place] for place in counts), reference=answer.reference[counts]
        )

    def _ended(self, ids: IntArray) -> bool:
        return int(ids[-1]) in self.settings.stop_token_ids

    def _sampled(self, answer: _Answer) -> Sampled:
        reference = np.concatenate([self.reference.of(answer.prompt), answer.reference])
        return Sampled.of(answer.truth, answer.samples, reference)

    def _count(self, answers: Sequence[_Answer], step: int, metrics: MetricSums) -> None:
        samples = [sample for answer in answers for sample in answer.samples]
        drawn_at = [answer.drawn_at for answer in answers for _ in answer.samples]

        def add(name: str, values: Sequence[float]) -> None:
            metrics.add(name, to_device(torch.tensor(values, dtype=torch.float64), self.device))

        add("generator/length", [len(sample) for sample in samples])
        add("generator/eos_rate", [float(self._ended(sample)) for sample in samples])
        add("generator/staleness", [step - at for at in drawn_at])

    def _show(self, answers: Sequence[_Answer], step: int) -> None:
        for answer in answers[: self.settings.shown_per_step]:
            truth = answer.truth
            self.log.append_row(
                {
                    "step": step + 1,
                    "origin": truth.origin,
                    "prompt": self.decode(truth.prompt.tolist()),
                    "truth": self.decode(truth.responses[0].tolist()),
                    "samples": [self.decode(sample.tolist()) for sample in answer.samples],
                    "ended": [self._ended(sample) for sample in answer.samples],
                    "drawn_after_step": answer.drawn_at,
                }
            )
