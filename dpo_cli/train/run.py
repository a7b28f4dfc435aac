"""One run from a checked config to a final model; every stage leaves what it found in the run folder."""

from __future__ import annotations

import functools
import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dpo_cli
from dpo_cli.atomic import write_json
from dpo_cli.batch.order import examples_shown, global_batch, steps_per_epoch
from dpo_cli.config.schema import AdamWConfig, Config, OptimizerConfig
from dpo_cli.data.example import Examples
from dpo_cli.data.prepare import PreparedData, prepare_data
from dpo_cli.engine.single_device import OptimizerSettings, SingleDeviceEngine
from dpo_cli.errors import CheckpointError, ConfigError, Interrupted, StoreError
from dpo_cli.policy.export import export_final
from dpo_cli.policy.folder import resolve_model_folder
from dpo_cli.policy.load import LoadedModel, load_model, load_reference
from dpo_cli.policy.model_card import model_card
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.self_test import packed_self_test
from dpo_cli.policy.tokenizer import load_tokenizer, read_stop_token_ids
from dpo_cli.reference.identity import model_identity
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.train.checkpoint import CheckpointStore
from dpo_cli.train.console import RunConsole
from dpo_cli.train.device import choose_device, describe, environment, make_repeatable
from dpo_cli.train.loop import LoopSettings, Progress, Training
from dpo_cli.train.metrics_log import MetricsLog
from dpo_cli.train.objective import Objective
from dpo_cli.train.reference_pass import ReferencePass, release_memory
from dpo_cli.train.results import TaskAccuracy, formula_of, held_out_results, prompt_encoder
from dpo_cli.train.schedule import learning_rate
from dpo_cli.train.step import PreferenceData, starting_loss
from dpo_cli.train.stop import StopRequest
from dpo_cli.train.trackers import Trackers

MANIFEST = "run.json"
FINAL = "final"
COMPLETED = "dpo_run.json"
# How far the first loss may be from that of a policy equal to its reference: rounding, scaled by the margins' spread.
_START_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def run_training(config: Config, *, run_dir: Path, console: RunConsole | None = None) -> None:
    """Train as `config` says, in `run_dir`, from where that folder stands: from nothing, or from its last checkpoint.

    Raises a DpoError for whatever the user can mend, Interrupted (exit code 75) after a signal.
    """
    run = _Run(config, run_dir, console or RunConsole(), StopRequest())
    with run.stop.listening():
        try:
            run.execute()
        except Interrupted as stopped:
            stopped.hint = f"dpo-train resume={run_dir}"
            raise


@dataclass(frozen=True)
class _Run:
    config: Config
    run_dir: Path
    console: RunConsole
    stop: StopRequest

    def execute(self) -> None:
        config, say = self.config, self.console.say
        if self._complete():
            say(f"This run is complete: {self.run_dir / FINAL}")
            return
        began = time.monotonic()
        device = choose_device(config.hardware.device)
        make_repeatable(seed=config.seed, deterministic=config.deterministic)
        say(f"run: {self.run_dir}")
        say(f"device: {describe(device)}")
        objective = Objective.of(build_loss(config))
        data = self._prepare_data(objective)
        policy = load_model(config.model, device=device, seed=config.seed, max_tokens=config.data.max_tokens)
        packed = PackedModel(policy.model)
        tested = packed_self_test(packed, vocabulary=len(policy.tokenizer), where=str(policy.folder))
        say(
            f"model: {config.model.path}, {_parameter_count(policy.model)} parameters in {policy.dtype_name}; packed and plain "
            f"forward agree to {tested.largest_difference:.0e} nats a token"
        )
        self._check_unchanged(data, policy, device)
        train, held_out = self._with_references(data, policy, packed, objective, device)
        accuracy = self._task_accuracy(data, policy)
        if accuracy is not None:
            accuracy.before(policy, self.console)

        training = self._assemble(policy, packed, objective, train, held_out, device)
        progress = self._resume(training)
        if progress.step == 0:
            self._check_start(training)
        training.run(progress)
        difference = None if accuracy is None else accuracy.after(policy, self.console)
        card = self._card(policy, objective, difference)
        self._export(policy, card, progress.step)
        say(f"done in {_duration(time.monotonic() - began)}: {self.run_dir / FINAL}")

    @property
    def _length(self) -> dict[str, float | None]:
        return {"epochs": self.config.epochs, "max_steps": self.config.max_steps}

    def _complete(self) -> bool:
        """Whether the final model is there, of a training as long as is asked for now."""
        if not (self.run_dir / FINAL).exists():
            return False
        completed = json.loads((self.run_dir / FINAL / COMPLETED).read_text())
        return bool(completed["length"] == self._length)

    def _export(self, policy: LoadedModel, card: str, step: int) -> None:
        final = self.run_dir / FINAL
        if final.exists():
            # A run that was prolonged keeps the model it had before.
            earlier = json.loads((final / COMPLETED).read_text())["step"]
            final.rename(self.run_dir / f"{FINAL}-step-{earlier:08d}")
        export_final(policy, final, card=card, notes={COMPLETED: {"step": step, "length": self._length}})

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
        write_json(self.run_dir / "data.json", data.report.as_dict())
        return data

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
        self, data: PreparedData, policy: LoadedModel, packed: PackedModel, objective: Objective, device: torch.device
    ) -> tuple[PreferenceData, PreferenceData | None]:
        if not objective.declaration.needs_reference:
            return PreferenceData(data.train, None), _unless_none(data.eval, None)
        reference = load_reference(self.config.model, policy, device=device, max_tokens=self.config.data.max_tokens)
        self.console.say(f"reference model: {self._reference_name()}")
        scoring = ReferencePass(
            reference=reference or policy,
            packed=packed if reference is None else PackedModel(reference.model),
            store_dir=self._store_dir,
            run_dir=self.run_dir,
            tokens_per_batch=self.config.tokens_per_microbatch,
            seed=self.config.seed,
            console=self.console,
            stop=self.stop,
        )
        config = self.config
        shown = examples_shown(
            total_steps(config, len(data.train)),
            seed=config.seed,
            examples=len(data.train),
            global_pairs=config.global_pairs,
        )
        train = scoring.sums(data.train, "train", shown)
        held_out = None if data.eval is None else scoring.sums(data.eval, "eval", np.arange(len(data.eval)))
        del scoring, reference
        release_memory()
        return PreferenceData(data.train, train), _unless_none(data.eval, held_out)

    def _reference_name(self) -> str:
        model = self.config.model
        if model.reference in (None, "start"):
            adapted = f" with the adapter {model.adapter}" if model.adapter else ""
            return f"{model.path}{adapted}, the policy at its start"
        return f"{model.path}, without the adapter" if model.reference == "base" else str(model.reference)

    def _task_accuracy(self, data: PreparedData, policy: LoadedModel) -> TaskAccuracy | None:
        settings = self.config.data.exact_match
        if settings is None:
            return None
        encode = prompt_encoder(
            policy.tokenizer, chat=any(source.chat_examples for source in data.report.train.sources)
        )
        return TaskAccuracy.of(settings, encode, self.run_dir)

    def _assemble(
        self,
        policy: LoadedModel,
        packed: PackedModel,
        objective: Objective,
        train: PreferenceData,
        held_out: PreferenceData | None,
        device: torch.device,
    ) -> Training:
        config = self.config
        settings = LoopSettings(
            seed=config.seed,
            total_steps=total_steps(config, len(train.examples)),
            global_pairs=config.global_pairs,
            tokens_per_microbatch=config.tokens_per_microbatch,
            log_every=config.log_every,
            eval_every=config.eval_every,
            save_every=config.save_every,
        )
        checkpoints = CheckpointStore(
            self.run_dir / "checkpoints", keep=config.keep_checkpoints, notify=self.console.say
        )
        return Training(
            settings=settings,
            score=packed,
            engine=SingleDeviceEngine(policy.model, optimizer_settings(config.optimizer)),
            objective=objective,
            train=train,
            held_out=held_out,
            schedule=functools.partial(
                learning_rate,
                schedule=config.optimizer.schedule,
                peak=config.optimizer.lr,
                warmup_steps=config.optimizer.warmup_steps,
                total_steps=settings.total_steps,
                final_fraction=config.optimizer.final_lr_fraction,
            ),
            checkpoints=checkpoints,
            metrics=MetricsLog(self.run_dir / "metrics.jsonl"),
            trackers=Trackers.of(config.logger, self.run_dir),
            console=self.console,
            stop=self.stop,
            device=device,
        )

    def _resume(self, training: Training) -> Progress:
        training.checkpoints.recover()
        checkpoint = training.checkpoints.latest_good()
        progress = Progress() if checkpoint is None else training.restore(checkpoint)
        if checkpoint is not None:
            self.console.say(f"resumed after step {progress.step} of {training.settings.total_steps}")
        training.forget_after(progress.step, began=checkpoint is not None)
        return progress

    def _check_start(self, training: Training) -> None:
        """At step 0 the policy is its reference, so the loss has a known value: compare, and say so."""
        if training.train.reference is None or self.config.model.reference not in (None, "start"):
            return
        first = global_batch(
            0,
            seed=self.config.seed,
            examples=len(training.train.examples),
            global_pairs=training.settings.global_pairs,
        )
        found, expected = starting_loss(
            training.train,
            training.score,
            training.objective,
            first,
            tokens_per_microbatch=training.settings.tokens_per_microbatch,
            device=training.device,
        )
        self.console.say(f"step 0: loss {found:.6f}; a policy equal to its reference has {expected:.6f}")
        tolerance = _START_TOLERANCE[next(training.score.parameters()).dtype]
        if not abs(found - expected) <= tolerance * max(1.0, abs(expected)):
            raise StoreError(
                f"The first loss is {found:.6f}, but the policy is still its reference, which gives {expected:.6f}.",
                where=str(self.run_dir),
                hint="if log-probs came with the data, name the model they are from in model.reference",
            )

    def _card(self, policy: LoadedModel, objective: Objective, difference: Any) -> str:
        config = self.config
        return model_card(
            name=self.run_dir.name,
            base=config.model.path,
            reference=self._reference_name() if objective.declaration.needs_reference else "none: this loss needs none",
            data=[source.path for source in config.data.train],
            loss=config.loss.name,
            formula=formula_of(objective.loss),
            config=config.as_dict(),
            results=held_out_results(self.run_dir / "metrics.jsonl", difference),
            adapter=config.model.adapter,
            lora=config.model.lora is not None,
            version=dpo_cli.__version__,
        )


def build_loss(config: Config) -> Callable[..., Any]:
    """Import the loss that the config names and bind its parameters. Raises ConfigError if it cannot be imported."""
    module_name, _, function_name = config.loss.target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The loss cannot be imported: {error}.", where=f"loss._target_={config.loss.target}"
        ) from error
    return functools.partial(function, **config.loss.parameters)


def total_steps(config: Config, examples: int) -> int:
    """Optimiser steps of the whole run: the earlier of its two ends."""
    per_epoch = steps_per_epoch(examples, config.global_pairs)
    ends = [math.ceil(config.epochs * per_epoch)] if config.epochs is not None else []
    return min([*ends, config.max_steps] if config.max_steps is not None else ends)


def optimizer_settings(optimizer: OptimizerConfig) -> OptimizerSettings:
    common = OptimizerSettings(
        name=optimizer.name,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        eps=optimizer.eps,
    )
    if isinstance(optimizer, AdamWConfig):
        return replace(common, betas=optimizer.betas)
    return replace(common, alpha=optimizer.alpha, momentum=optimizer.momentum)


def _unless_none(examples: Examples | None, sums: ReferenceSums | None) -> PreferenceData | None:
    return None if examples is None else PreferenceData(examples, sums)


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
