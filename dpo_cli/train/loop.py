"""The training loop: order, gradient, guard, step, log, evaluate, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo_cli.batch.order import global_batch, steps_per_epoch
from dpo_cli.engine.interface import OPTIMIZER, WEIGHTS, Engine, SavedTensor
from dpo_cli.engine.ranks import Ranks
from dpo_cli.tracking.trackers import Trackers
from dpo_cli.train.batch_loss import BatchLoss, Normalisers
from dpo_cli.train.checkpoint import Checkpoint, CheckpointStore
from dpo_cli.train.console import RunConsole
from dpo_cli.train.eval_pairs import EvalPairs
from dpo_cli.train.generator import BUFFER, Generator, GeneratorBatch
from dpo_cli.train.health_watch import HealthWatch
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.metrics_log import MetricsLog, read_metrics
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.moving_reference import MovingReference
from dpo_cli.train.stop import StopRequest
from dpo_cli.train.task_eval import TaskEvaluation
from dpo_cli.train.throughput import Clock, Utilisation

# The group of a checkpoint that holds the states of random generators.
RANDOM = "rng"


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself decides by; see conf/config.yaml for the meaning of each.

    A cadence of 0 means only at the end (and, for evaluation, at the start).
    """

    seed: int
    total_steps: int
    global_pairs: int
    tokens_per_microbatch: int
    log_every: int
    eval_every: int
    save_every: int


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint keeps beside weights, optimiser and random state.

    window: metrics since the last line of training metrics. evaluation_due: the held-out metrics of this step are
    still to be taken, as they are before the first step, or when a stop was requested before they were done.
    ended: a finding has ended the run before its last step; of a resumed run, its metrics tell.
    """

    step: int = 0
    tokens: int = 0
    window: MetricSums = field(default_factory=MetricSums)
    evaluation_due: bool = True
    ended: bool = False


@dataclass(frozen=True)
class Training:
    """Everything the loop works with, assembled by `run_training`."""

    settings: LoopSettings
    loss: BatchLoss
    engine: Engine
    ranks: Ranks
    train: PreferenceData
    moving: MovingReference | None
    held_out: PreferenceData | None
    pairs: EvalPairs | None
    generator: Generator | None
    task: TaskEvaluation | None
    schedule: Callable[[int], float]
    checkpoints: CheckpointStore
    metrics: MetricsLog
    health: HealthWatch | None
    trackers: Trackers
    console: RunConsole
    stop: StopRequest
    utilisation: Utilisation | None = None

    def run(self, progress: Progress) -> None:
        """Train from `progress` to the last step, or to where a finding ends the run.

        Raises Interrupted after saving when a stop was requested.
        """
        with self.console.training(self.settings.total_steps, progress.step, self._history):
            self._run(progress)

    def _run(self, progress: Progress) -> None:
        settings = self.settings
        if progress.evaluation_due:
            self._evaluate(progress)
        if progress.evaluation_due:
            # Cut short by a request to stop; the steps so far are saved, and evaluating them comes first again.
            self.stop.check(self.stop.kept)
        clock = Clock(self.loss.device, self.utilisation)
        with self.stop.deferred():
            while progress.step < settings.total_steps and not progress.ended:
                written = self._written(progress.step)
                if self.generator is not None:
                    clock.sampled()
                indices = global_batch(
                    progress.step,
                    seed=settings.seed,
                    examples=len(self.train.examples),
                    global_pairs=settings.global_pairs,
                )
                micros = self._data(progress.step).microbatches(
                    indices,
                    tokens_per_microbatch=settings.tokens_per_microbatch,
                    ranks=self.ranks,
                    sampled=written.sampled,
                )
                clock.data_ready()
                outcome = self.loss.accumulate_gradient(
                    micros, self.engine, step=progress.step, counts=Normalisers.counts(indices, written.sampled)
                )
                learning_rate = self.schedule(progress.step)
                # What the ranks must agree on travels with the loss; of findings the main rank alone knows.
                unhealthy = self.health is not None and self.health.ends is not None
                agreed = (outcome.tokens, self.stop.requested is not None, unhealthy)
                result = self.engine.step(learning_rate, outcome.loss, agreed)
                if not result.sound:
                    raise self.loss.blame(micros, self.engine)

                tokens, stops, ends = map(int, result.beside)
                progress.step += 1
                progress.tokens += tokens
                progress.window.merge(outcome.metrics)
                progress.window.merge(written.metrics)
                if self.ranks.is_main:
                    # Filled where it is: a number that is copied there would make the host wait.
                    progress.window.add("loss", torch.full((), result.loss, device=self.loss.device))
                clock.step_done(tokens)
                stopping = stops > 0 and self.stop.agreed(self.ranks)
                progress.ended = ends > 0 and progress.step < settings.total_steps
                last = progress.ended or progress.step == settings.total_steps
                if progress.ended:
                    self.console.say(f"health.stop_on: the run ends here, after step {progress.step}")
                if last or _due(progress.step, settings.log_every):
                    timing = clock.read()
                    self._log(progress, {"grad_norm": result.gradient_norm, "learning_rate": learning_rate, **timing})
                self.console.advance(progress.step)
                if last or _due(progress.step, settings.eval_every):
                    progress.evaluation_due = True
                    self._evaluate(progress)
                    clock.begin()
                    # Still due where a stop was requested meanwhile: no step may come before it is made up for.
                    stopping = stopping or progress.evaluation_due
                if last or _due(progress.step, settings.save_every) or stopping:
                    self._save(progress)
                    clock.begin()
                if stopping:
                    self.stop.check(f"Step {progress.step} of {settings.total_steps} is saved.")

    def _data(self, step: int) -> PreferenceData:
        return self.train if self.moving is None else self.moving.data(step)

    def _written(self, step: int) -> GeneratorBatch:
        """What the policy has written for this step."""
        return GeneratorBatch((), MetricSums()) if self.generator is None else self.generator.batch(step)

    def ended_before(self, step: int) -> bool:
        """Whether a finding of an earlier step has ended the run; all ranks hear what the main one knows."""
        if self.health is None:
            return False
        ends = self.health.ends
        return self.ranks.broadcast(ends is not None and ends.step < step < self.settings.total_steps)

    def ended_by(self) -> str | None:
        """The finding that has ended the run; all ranks hear what the main one knows."""
        return self.ranks.broadcast(None if self.health is None or self.health.ends is None else self.health.ends.name)

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Put weights, optimiser and random state back; the position comes back as Progress."""
        tensors, state = self.checkpoints.load(checkpoint), checkpoint.state
        self.engine.load(tensors[WEIGHTS], tensors.get(OPTIMIZER, {}))
        restore_random_state(tensors[RANDOM], self.ranks)
        if self.generator is not None:
            self.generator.load(tensors.get(BUFFER, {}))
        return Progress(
            step=state["step"],
            tokens=state["tokens"],
            window=self._window(state["windows"]),
            evaluation_due=state["evaluation_due"],
        )

    def _window(self, saved: list[dict[str, tuple[float, float]]]) -> MetricSums:
        """This rank's share of the metrics; of another number of ranks, the main one goes on with all shares."""
        if len(saved) == self.ranks.size:
            return MetricSums.from_state(saved[self.ranks.rank], self.loss.device)
        window = MetricSums()
        for state in saved if self.ranks.is_main else ():
            window.merge(MetricSums.from_state(state, self.loss.device))
        return window

    def _save(self, progress: Progress) -> None:
        self.metrics.sync()
        if self.generator is not None:
            self.generator.log.sync()
        if self.pairs is not None:
            self.pairs.log.sync()
        self.trackers.flush()
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "windows": self.ranks.gather(progress.window.state()),
            "evaluation_due": progress.evaluation_due,
        }
        with self.console.doing("saving"):
            self.checkpoints.save(progress.step, self._saved_tensors(), state, needed=self.engine.saved_bytes)

    def _saved_tensors(self) -> Iterator[SavedTensor]:
        yield from self.engine.saved_tensors()
        if self.generator is not None:
            yield from self.generator.saved_tensors()
        for name, tensor in random_state().items():
            yield SavedTensor(RANDOM, f"rank-{self.ranks.rank}/{name}", tensor)

    def _log(self, progress: Progress, extra: dict[str, float]) -> None:
        metrics = self._with_derived(progress.window.over_ranks(self.ranks).means())
        metrics.update(extra, epoch=self._epoch(progress.step), num_tokens=progress.tokens)
        progress.window = MetricSums()
        self._record(progress.step, "train", metrics)

    def _evaluate(self, progress: Progress) -> None:
        """Take the held-out metrics, unless a stop was requested: the steps are to be saved first."""
        with self.console.doing("evaluating"):
            metrics = self._held_out_metrics()
        progress.evaluation_due = metrics is None
        if self.pairs is not None:
            if progress.evaluation_due:
                self.pairs.forget()
            else:
                self.pairs.record(progress.step, last=progress.ended or progress.step == self.settings.total_steps)
        if not metrics:
            return
        metrics = self._with_derived(metrics) | {"epoch": self._epoch(progress.step)}
        self._record(progress.step, "eval", metrics)

    def _held_out_metrics(self) -> dict[str, float] | None:
        """None where a stop was requested before all were taken."""
        metrics: dict[str, float] | None = {}
        if self.held_out is not None:
            metrics = self.loss.evaluate(
                self.held_out,
                global_pairs=self.settings.global_pairs,
                tokens_per_microbatch=self.settings.tokens_per_microbatch,
                should_stop=lambda: self.stop.agreed(self.ranks),
                watch=None if self.pairs is None else self.pairs.watch,
            )
        if self.task is not None and metrics is not None:
            solved = self.task.evaluate(self.engine, should_stop=lambda: self.stop.requested is not None)
            metrics = None if solved is None else metrics | solved
        return metrics

    def _history(self) -> Iterator[dict[str, Any]]:
        return read_metrics(self.metrics.path) if self.metrics.path.exists() else iter(())

    def _record(self, step: int, split: str, metrics: dict[str, float]) -> None:
        if not self.ranks.is_main:
            return
        self.metrics.append(step=step, split=split, values=metrics)
        self.trackers.log(step, split, metrics)
        self.console.metrics(step, self.settings.total_steps, split, metrics)
        if self.health is not None:
            for told in self.health.after({"step": step, "split": split, **metrics}):
                self.trackers.finding(told)

    def _with_derived(self, metrics: dict[str, float]) -> dict[str, float]:
        """Unpaired examples have no margin each; that of their means is what can be said."""
        if "rewards/margins" not in metrics and {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            return metrics | {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}
        return metrics

    def _epoch(self, step: int) -> float:
        return step / steps_per_epoch(len(self.train.examples), self.settings.global_pairs)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def random_state() -> dict[str, torch.Tensor]:
    """The state of every generator a step may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(saved: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Put this rank's generators back; a rank that the saved run did not have goes on with its own."""
    mine = f"rank-{ranks.rank}/"
    if f"{mine}cpu" in saved:
        torch.set_rng_state(saved[f"{mine}cpu"].cpu())
    if f"{mine}cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved[f"{mine}cuda"].cpu())
