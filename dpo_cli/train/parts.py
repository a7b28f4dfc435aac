"""The parts of a run that follow from its configuration alone."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dpo_cli.batch.order import steps_per_epoch
from dpo_cli.config.schema import AdamWConfig, Config, HardwareConfig, OptimizerConfig
from dpo_cli.engine.backend import Backend, Partitioned, Replicated
from dpo_cli.engine.interface import OptimizerSettings
from dpo_cli.engine.ranks import Ranks
from dpo_cli.engine.zero_config import ZeroSettings
from dpo_cli.errors import ConfigError
from dpo_cli.train.loop import LoopSettings
from dpo_cli.train.schedule import learning_rate


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


def loop_settings(config: Config, examples: int) -> LoopSettings:
    """examples: rows to train on. The earlier of the two ends, epochs and max_steps, ends the run."""
    per_epoch = steps_per_epoch(examples, config.global_pairs)
    ends = [] if config.epochs is None else [math.ceil(config.epochs * per_epoch)]
    ends += [] if config.max_steps is None else [config.max_steps]
    return LoopSettings(
        seed=config.seed,
        total_steps=min(ends),
        global_pairs=config.global_pairs,
        tokens_per_microbatch=config.tokens_per_microbatch,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )


def schedule_of(optimizer: OptimizerConfig, *, total_steps: int) -> Callable[[int], float]:
    """From a step, counted from 0, to its learning rate."""
    return functools.partial(
        learning_rate,
        schedule=optimizer.schedule,
        peak=optimizer.lr,
        warmup_steps=optimizer.warmup_steps,
        total_steps=total_steps,
        final_fraction=optimizer.final_lr_fraction,
    )


def backend_of(hardware: HardwareConfig, device: torch.device, ranks: Ranks) -> Backend:
    """Raises ConfigError where DeepSpeed is needed and not installed."""
    if not hardware.zero_stage:
        return Replicated(device, ranks)
    zero = ZeroSettings(
        stage=hardware.zero_stage,
        offload_optimizer=hardware.offload_optimizer,
        offload_parameters=hardware.offload_parameters,
        nvme_path=hardware.nvme_path,
        overrides=hardware.deepspeed,
    )
    return Partitioned(device, ranks, zero)


def optimizer_settings(optimizer: OptimizerConfig) -> OptimizerSettings:
    common = OptimizerSettings(
        name=optimizer.name,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        eps=optimizer.eps,
    )
    if isinstance(optimizer, AdamWConfig):
        return replace(common, betas=optimizer.betas, state_bits=optimizer.state_bits)
    return replace(common, alpha=optimizer.alpha, momentum=optimizer.momentum)


def reference_name(config: Config) -> str:
    """The reference in words, for the screen and the model card."""
    model = config.model
    moving = (
        f", replaced by the policy every {model.reference_sync_steps:,} steps" if model.reference_sync_steps else ""
    )
    if model.reference in (None, "start"):
        adapted = f" with the adapter {model.adapter}" if model.adapter else ""
        return f"{model.path}{adapted}, the policy at its start{moving}"
    named = f"{model.path}, without the adapter" if model.reference == "base" else str(model.reference)
    return f"{named}{moving}"
