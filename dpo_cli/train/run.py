"""One run from a checked config to a final model; every stage leaves what it found in the run folder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpo_cli.atomic import write_json
from dpo_cli.batch.order import examples_shown, global_batch
from dpo_cli.config.schema import Config
from dpo_cli.data.prepare import PreparedData, prepare_data
from dpo_cli.engine.single_device import SingleDeviceEngine
from dpo_cli.errors import CheckpointError, Interrupted, OutOfMemory, StoreError
from dpo_cli.forecast.machine import Machine
from dpo_cli.forecast.plan import plan_or_nothing
from dpo_cli.forecast.report import summary as forecast_summary
from dpo_cli.policy.folder import resolve_model_folder
from dpo_cli.policy.load import LoadedModel, load_model, load_reference
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.self_test import packed_self_test
from dpo_cli.policy.tokenizer import load_tokenizer, read_stop_token_ids
from dpo_cli.reference.identity import model_identity
from dpo_cli.reference.spot_check import largest_rounding
from dpo_cli.train.batch_loss import BatchLoss
from dpo_cli.train.checkpoint import CheckpointStore
from dpo_cli.train.console import RunConsole
from dpo_cli.train.device import choose_device, describe, environment, make_repeatable, memory_of
from dpo_cli.train.final import completed_run, write_final
from dpo_cli.train.loop import LoopSettings, Progress, Training
from dpo_cli.train.metrics_log import MetricsLog
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss, loop_settings, optimizer_settings, reference_name, schedule_of
from dpo_cli.train.reference_pass import ReferencePass, release_memory
from dpo_cli.train.stop import StopRequest
from dpo_cli.train.task_accuracy import TaskAccuracy, prompt_encoder
from dpo_cli.train.trackers import Trackers

MANIFEST = "run.json"


def run_training(config: Config, *, run_dir: Path, console: RunConsole | None = None) -> None:
    """Train as `config` says, in `run_dir`, from where that folder stands: from nothing, or from its last checkpoint.

    Raises a DpoError for whatever the user can mend, Interrupted (exit code 75) after a signal.
    """
    run = _Run(config, run_dir, console or RunConsole(), StopRequest())
    try:
        with run.stop.listening():
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

    def execute(self) -> None:
        config, say = self.config, self.console.say
        complete = completed_run(config, self.run_dir)
        if complete is not None:
            say(f"This run is complete: {complete}")
            return
        began = time.monotonic()
        device = choose_device(config.hardware.device)
        make_repeatable(seed=config.seed, deterministic=config.deterministic)
        say(f"run: {self.run_dir}")
        say(f"device: {describe(device)}")
        objective = Objective.of(build_loss(config))
        data = self._prepare_data(objective)
        self._forecast(device)
        policy = load_model(config.model, device=device, seed=config.seed, max_tokens=config.data.max_tokens)
        packed = PackedModel(policy.model)
        tested = packed_self_test(packed, vocabulary=len(policy.tokenizer), where=str(policy.folder))
        say(f"model: {config.model.path}, {_parameter_count(policy.model)} parameters in {policy.dtype_name}")
        say(f"self-test: packed and plain forward agree to {tested.largest_difference:.0e} nats a token")
        self._check_unchanged(data, policy, device)
        settings = loop_settings(config, len(data.train))
        if config.optimizer.warmup_steps >= settings.total_steps:
            say(f"note: all {settings.total_steps} steps warm up; optimizer.lr itself is never reached")
        train, held_out = self._with_references(data, policy, packed, objective, settings)
        accuracy = self._task_accuracy(data, policy)
        if accuracy is not None:
            accuracy.before(policy, self.console)

        training = Training(
            settings=settings,
            loss=BatchLoss(packed, objective, device),
            engine=SingleDeviceEngine(policy.model, optimizer_settings(config.optimizer)),
            train=train,
            held_out=held_out,
            schedule=schedule_of(config.optimizer, total_steps=settings.total_steps),
            checkpoints=CheckpointStore(self.run_dir / "checkpoints", keep=config.keep_checkpoints, notify=say),
            metrics=MetricsLog(self.run_dir / "metrics.jsonl"),
            trackers=Trackers.of(config.logger, self.run_dir),
            console=self.console,
            stop=self.stop,
        )
        with training.metrics, training.trackers:
            progress = self._resume(training)
            if progress.step == 0:
                self._check_start(training)
            training.run(progress)
        self.stop.kept = f"All {progress.step} steps are saved; the final model is still to be written."
        difference = None if accuracy is None else accuracy.after(policy, self.console)
        final = write_final(policy, objective, config, run_dir=self.run_dir, step=progress.step, difference=difference)
        say(f"done in {_duration(time.monotonic() - began)}: {final}")

    def _forecast(self, device: torch.device) -> None:
        plan = plan_or_nothing(self.config, Machine(on_gpu=device.type == "cuda", device_bytes=memory_of(device)))
        if plan is not None:
            self.console.say(forecast_summary(plan))

    def _prepare_data(self, objective: Objective) -> PreparedData:
        model = self.config.model
        folder = resolve_model_folder(model.path, model.revision, trust_remote_code=model.trust_remote_code)
        tokenizer = load_tokenizer(folder, trust_remote_code=model.trust_remote_code)
        data = prepare_data(
            self.config.data,
            tokenizer,
            kind=objective.declaration.kind,
            stop_token_ids=read_stop_token_ids(folder, tokenizer),
            seed=self.config.seed,
            store_dir=self._store_dir,
        )
        for line in data.report.lines():
            self.console.say(line)
        self._warn_of_large_examples(data)
        write_json(self.run_dir / "data.json", data.report.as_dict())
        return data

    def _warn_of_large_examples(self, data: PreparedData) -> None:
        """data.max_tokens bounds prompt + longest response; an example has several responses."""
        budget = self.config.tokens_per_microbatch
        over = int((data.train.sizes > budget).sum())
        if over:
            self.console.say(
                f"note: {over:,} examples have more than tokens_per_microbatch={budget:,} tokens in all, up to "
                f"{int(data.train.sizes.max()):,}; each of them goes through the model alone"
            )

    @property
    def _store_dir(self) -> Path:
        return Path(self.config.store_dir).expanduser()

    def _check_unchanged(self, data: PreparedData, policy: LoadedModel, device: torch.device) -> None:
        """Note what the run's numbers depend on; on resuming, compare."""
        identity = model_identity(**policy.identity, cache_dir=self._store_dir / "hashes")
        around = environment(device)
        here = {"data": data.digest, "model": identity.key, "environment": around}
        file = self.run_dir / MANIFEST
        if not file.exists():
            write_json(file, here)
            return
        began = json.loads(file.read_text())
        for part, hint in (("data", "put the data back as they were"), ("model", "put the model back as it was")):
            if began[part] != here[part]:
                raise CheckpointError(
                    f"The {part} is not what this run began with.", where=str(file), hint=f"{hint}, or start a new run"
                )
        for name, old in began["environment"].items():
            if around.get(name) != old:
                self.console.say(
                    f"note: {name} was {old} and is {around.get(name)} now; the last bits of the results may differ"
                )

    def _with_references(
        self,
        data: PreparedData,
        policy: LoadedModel,
        packed: PackedModel,
        objective: Objective,
        settings: LoopSettings,
    ) -> tuple[PreferenceData, PreferenceData | None]:
        if not objective.declaration.needs_reference:
            return PreferenceData(data.train, None), None if data.eval is None else PreferenceData(data.eval, None)
        self.console.say(f"reference model: {reference_name(self.config)}")
        reference = load_reference(
            self.config.model, policy, device=packed.device, max_tokens=self.config.data.max_tokens
        )
        scoring = ReferencePass(
            reference=reference or policy,
            packed=packed if reference is None else PackedModel(reference.model),
            store_dir=self._store_dir,
            run_dir=self.run_dir,
            tokens_per_batch=settings.tokens_per_microbatch,
            seed=settings.seed,
            console=self.console,
            stop=self.stop,
        )
        shown = examples_shown(
            settings.total_steps,
            seed=settings.seed,
            examples=len(data.train),
            global_pairs=settings.global_pairs,
        )
        train = PreferenceData(data.train, scoring.sums(data.train, "train", shown))
        held_out = None
        if data.eval is not None:
            held_out = PreferenceData(data.eval, scoring.sums(data.eval, "eval", np.arange(len(data.eval))))
        del scoring, reference
        release_memory()
        return train, held_out

    def _task_accuracy(self, data: PreparedData, policy: LoadedModel) -> TaskAccuracy | None:
        settings = self.config.data.exact_match
        if settings is None:
            return None
        encode = prompt_encoder(
            policy.tokenizer, chat=any(source.chat_examples for source in data.report.train.sources)
        )
        return TaskAccuracy.of(settings, encode, self.run_dir)

    def _resume(self, training: Training) -> Progress:
        training.checkpoints.recover()
        checkpoint = training.checkpoints.latest_good()
        total = training.settings.total_steps
        if checkpoint is None:
            progress = Progress()
            training.metrics.truncate_after(-1)
        else:
            progress = training.restore(checkpoint)
            if progress.step > total:
                raise CheckpointError(
                    f"This run has taken {progress.step} steps already, and is to end after {total}.",
                    where=str(checkpoint.folder),
                    hint="leave epochs and max_steps as they were, or start a new run",
                )
            training.metrics.truncate_after(progress.step, evaluation_due=progress.evaluation_due)
            self.console.say(f"resumed after step {progress.step} of {total}")
            self.stop.kept = f"Step {progress.step} is saved, as it was."
        training.trackers.begin(progress.step)
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
    count = sum(parameter.numel() for parameter in model.parameters())
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.2f} {name}"
    return f"{count:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
