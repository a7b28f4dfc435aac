"""One run from a checked config to a final model; every stage leaves what it found in the run folder."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dpo_cli.atomic import write_json
from dpo_cli.batch.order import global_batch
from dpo_cli.config.schema import Config
from dpo_cli.durations import in_words
from dpo_cli.engine.interface import whole_shape
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import CheckpointError, Interrupted, OutOfMemory, StoreError
from dpo_cli.forecast.machine import Machine
from dpo_cli.forecast.plan import Plan, plan_or_nothing
from dpo_cli.forecast.report import summary as forecast_summary
from dpo_cli.policy.export import final_state
from dpo_cli.policy.load import LoadedModel, load_model
from dpo_cli.policy.self_test import packed_self_test
from dpo_cli.reference.identity import identity_of
from dpo_cli.reference.spot_check import largest_rounding
from dpo_cli.reference.store import ReferenceStore, open_store
from dpo_cli.tracking.trackers import Trackers
from dpo_cli.train.batch_loss import BatchLoss
from dpo_cli.train.beginning import compare_with_beginning
from dpo_cli.train.checkpoint import CheckpointStore
from dpo_cli.train.console import RunConsole
from dpo_cli.train.device import choose_device, describe, environment, make_repeatable, memory_of
from dpo_cli.train.eval_pairs import LOGPS, EvalPairs
from dpo_cli.train.final import FINAL, completed_run, ended_early, write_final
from dpo_cli.train.health_watch import HealthWatch
from dpo_cli.train.loop import LoopSettings, Progress, Training
from dpo_cli.train.metrics_log import MetricsLog
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.moving_reference import MovingReference, check_moving_reference
from dpo_cli.train.moving_reference import describe as describe_moving
from dpo_cli.train.objective import Objective
from dpo_cli.train.on_policy import fitting_truths, make_generator
from dpo_cli.train.parts import backend_of, build_loss, loop_settings, optimizer_settings, schedule_of
from dpo_cli.train.references import Scorer
from dpo_cli.train.results import final_results
from dpo_cli.train.run_data import RunData, run_data
from dpo_cli.train.stop import StopRequest
from dpo_cli.train.task_eval import TaskEvaluation
from dpo_cli.train.throughput import Utilisation, typical_batch


def run_training(
    config: Config, *, run_dir: Path, console: RunConsole | None = None, ranks: Ranks | None = None
) -> None:
    """Train as `config` says, in `run_dir`, from where that folder stands: from nothing, or from its last checkpoint.

    ranks: the processes that train together, each of which calls this; None: this one alone.
    Raises a DpoError for whatever the user can mend, Interrupted (exit code 75) after a signal, EndedEarly (4) where a
    finding ended the run.
    """
    console = console or RunConsole(level=config.log_level)
    ranks = ranks or SoleRank()
    trackers = Trackers.of(config, run_dir, ranks=ranks.size) if ranks.is_main else Trackers.none(config, run_dir)
    run = _Run(config, run_dir, console, StopRequest(console.interject), ranks, trackers)
    try:
        # Whatever ends the run, the trackers hear of it, and are waited for once a Ctrl-C may end that wait.
        with trackers, run.stop.listening():
            run.execute()
    except Interrupted as stopped:
        stopped.hint = f"dpo-train resume={run_dir}"
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"The GPU's memory is full: {str(error).splitlines()[0]}",
            where=str(run_dir),
            hint="a smaller tokens_per_microbatch, model.gradient_checkpointing=true, or model.lora.rank=16",
        ) from error


@dataclass(frozen=True)
class _Run:
    config: Config
    run_dir: Path
    console: RunConsole
    stop: StopRequest
    ranks: Ranks
    trackers: Trackers

    def execute(self) -> None:
        config, say = self.config, self.console.say
        complete = completed_run(config, self.run_dir)
        if complete is not None:
            say(f"This run is complete: {complete}")
            return
        began = time.monotonic()
        device = choose_device(config.hardware.device)
        backend = backend_of(config.hardware, device, self.ranks)
        make_repeatable(seed=config.seed, deterministic=config.deterministic)
        say(f"run: {self.run_dir}")
        say(f"device: {describe(device, self.ranks.size)}")
        self.console.explain(f"environment: {environment(device)}")
        objective = Objective.of(build_loss(config))
        if config.model.reference_sync_steps is not None:
            check_moving_reference(objective.declaration)
        data = self._prepare_data(objective)
        plan = self._forecast(device)
        policy = load_model(
            config.model, device=device, seed=config.seed, max_tokens=config.data.max_tokens, reading=backend.reading
        )
        packed = policy.packed()
        say(f"model: {config.model.path}, {_parameter_count(policy.model)} parameters in {policy.dtype_name}")
        if policy.attention.told is not None:
            say(f"attention: {policy.attention.told}")
        store = self._check_unchanged(data, policy, device)
        settings = loop_settings(config, len(data.train))
        truths = None if data.generator is None else fitting_truths(data.generator, policy, config, say)
        if config.optimizer.warmup_steps >= settings.total_steps:
            say(f"note: all {settings.total_steps} steps warm up; optimizer.lr itself is never reached")

        scorer = Scorer(config, self.run_dir, self.console, self.stop, self.ranks, data, truths, settings)
        references = scorer.by_another_model(policy, objective, backend)
        engine = backend.training(packed, policy.model, optimizer_settings(config.optimizer), policy.dtype)
        tested = packed_self_test(packed, vocabulary=len(policy.tokenizer), where=str(policy.folder))
        say(f"self-test: packed and plain forward agree to {tested.largest_difference:.0e} nats a token")
        if references is None:
            references = scorer.by(engine.model, policy.dtype_name, store)
        task = self._task(data, policy)
        if task is not None:
            task.before(engine, self.console)

        with ExitStack() as alive:
            generator = None
            if references.truths is not None:
                generator = make_generator(
                    config,
                    references.truths,
                    policy,
                    engine,
                    backend,
                    total_steps=settings.total_steps,
                    run_dir=self.run_dir,
                    say=say,
                    alive=alive,
                )
            training = Training(
                settings=settings,
                loss=BatchLoss(engine.model, objective, device, self.ranks),
                engine=engine,
                ranks=self.ranks,
                train=references.train,
                moving=self._moving(references.train, engine.model, settings, device),
                held_out=references.held_out,
                pairs=EvalPairs.of(
                    references.held_out,
                    objective,
                    policy.tokenizer,
                    alive.enter_context(MetricsLog(self.run_dir / LOGPS)),
                    self.ranks,
                    eval_every=settings.eval_every,
                    total_steps=settings.total_steps,
                ),
                generator=generator,
                task=task,
                schedule=schedule_of(config.optimizer, total_steps=settings.total_steps),
                checkpoints=CheckpointStore(
                    self.run_dir / "checkpoints", keep=config.keep_checkpoints, ranks=self.ranks, notify=say
                ),
                metrics=alive.enter_context(MetricsLog(self.run_dir / "metrics.jsonl")),
                health=HealthWatch.of(config, self.run_dir, self.console.find, alive),
                trackers=self.trackers,
                console=self.console,
                stop=self.stop,
                utilisation=Utilisation.of(plan, device, typical_batch(data.train, objective.trained_responses)),
            )
            progress = self._resume(training)
            training.checkpoints.check_room(engine.saved_bytes)
            if progress.step == 0:
                self._check_start(training)
            training.run(progress)
            ended_by = training.ended_by() if progress.ended else None
        self.stop.kept = f"All {progress.step} steps are saved; the final model is still to be written."
        difference = None if task is None else task.after(engine, self.console)
        lora = config.model.lora
        state = final_state(policy, engine.gathered, merge=lora is None or lora.merge)
        if self.ranks.is_main:
            write_final(
                policy,
                objective,
                config,
                run_dir=self.run_dir,
                step=progress.step,
                ended_by=ended_by,
                difference=difference,
                state=state,
            )
            self.trackers.results(progress.step, final_results(self.run_dir))
        self.ranks.barrier()
        if ended_by is not None:
            raise ended_early(self.run_dir, step=progress.step, name=ended_by)
        say(f"done in {in_words(time.monotonic() - began)}: {self.run_dir / FINAL}")

    def _forecast(self, device: torch.device) -> Plan | None:
        machine = Machine(device.type == "cuda", device_bytes=memory_of(device), devices=self.ranks.size)
        plan = plan_or_nothing(self.config, machine)
        if plan is not None:
            self.console.say(forecast_summary(plan))
        return plan

    def _prepare_data(self, objective: Objective) -> RunData:
        data = run_data(self.config, objective)
        for line in data.lines:
            self.console.say(line)
        self._warn_of_large_examples(data)
        if self.ranks.is_main:
            write_json(self.run_dir / "data.json", data.report)
        return data

    def _warn_of_large_examples(self, data: RunData) -> None:
        """data.max_tokens bounds prompt + longest response; an example has several responses."""
        budget = self.config.tokens_per_microbatch
        over = int((data.train.sizes > budget).sum())
        if over:
            self.console.say(
                f"note: {over:,} examples have more than tokens_per_microbatch={budget:,} tokens in all, up to "
                f"{int(data.train.sizes.max()):,}; each of them goes through the model alone"
            )

    def _check_unchanged(self, data: RunData, policy: LoadedModel, device: torch.device) -> ReferenceStore:
        """Note what the run's numbers depend on; on resuming, compare. Returns the store of the policy as it starts."""
        store_dir = Path(self.config.store_dir).expanduser()
        identity = identity_of(policy, store_dir=store_dir, ranks=self.ranks)
        if self.ranks.is_main:
            here = environment(device) | {"attention": policy.attention.name}
            beginning = {"data": data.digest, "model": identity.experiment_key, "environment": here}
            compare_with_beginning(self.run_dir, beginning, say=self.console.say)
        return open_store(store_dir, identity)

    def _moving(
        self, start: PreferenceData, policy: nn.Module, settings: LoopSettings, device: torch.device
    ) -> MovingReference | None:
        every = self.config.model.reference_sync_steps
        if every is None:
            return None
        self.console.say(describe_moving(every))
        return MovingReference(
            every=every,
            start=start,
            policy=policy,
            device=device,
            ranks=self.ranks,
            run_dir=self.run_dir,
            seed=settings.seed,
            total_steps=settings.total_steps,
            global_pairs=settings.global_pairs,
            tokens_per_microbatch=settings.tokens_per_microbatch,
            say=self.console.say,
        )

    def _task(self, data: RunData, policy: LoadedModel) -> TaskEvaluation | None:
        settings = self.config.eval.task
        if settings is None:
            return None
        return TaskEvaluation.of(settings, policy, self.run_dir, self.ranks, chat=data.chat)

    def _resume(self, training: Training) -> Progress:
        training.checkpoints.recover()
        checkpoint = training.checkpoints.latest_good()
        total = training.settings.total_steps
        if checkpoint is None:
            progress = Progress()
        else:
            progress = training.restore(checkpoint)
            if progress.step > total:
                raise CheckpointError(
                    f"This run has taken {progress.step} steps already, and is to end after {total}.",
                    where=str(checkpoint.folder),
                    hint="leave epochs and max_steps as they were, or start a new run",
                )
            self.console.say(f"resumed after step {progress.step} of {total}")
            self.stop.kept = f"Step {progress.step} is saved, as it was."
        if self.ranks.is_main:
            last = -1 if checkpoint is None else progress.step
            training.metrics.truncate_after(last, evaluation_due=progress.evaluation_due)
            if training.generator is not None:
                training.generator.log.truncate_after(last)
            if training.pairs is not None:
                training.pairs.log.truncate_after(last, evaluation_due=progress.evaluation_due)
            if training.health is not None:
                training.health.repeat(training.metrics.path)
        progress.ended = training.ended_before(progress.step)
        training.trackers.begin(progress.step, self.console.say)
        return progress

    def _check_start(self, training: Training) -> None:
        """At step 0 the policy is its reference, so the loss has a known value: compare, and say so."""
        if training.train.reference is None or self.config.model.reference not in (None, "start"):
            return
        settings = training.settings
        indices = global_batch(
            0, seed=settings.seed, examples=len(training.train.examples), global_pairs=settings.global_pairs
        )
        start = training.loss.starting_point(
            training.train, indices, tokens_per_microbatch=settings.tokens_per_microbatch
        )
        self.console.say(f"step 0: loss {start.loss:.6f}; a policy equal to its reference has {start.expected:.6f}")
        brought = training.train.examples[int(indices[0])].reference is not None
        dtype = str(next(training.loss.policy.parameters()).dtype)
        if not start.difference <= largest_rounding(dtype, brought=brought):
            raise StoreError(
                f"The policy is still its reference, but log-probs differ by {start.difference:.2g} nats a token.",
                where=str(self.run_dir),
                hint="if log-probs came with the data, name the model they are from in model.reference",
            )


def _parameter_count(model: torch.nn.Module) -> str:
    count = sum(math.prod(whole_shape(parameter)) for parameter in model.parameters())
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.2f} {name}"
    return f"{count:,}"
