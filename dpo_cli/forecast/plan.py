"""What a checked configuration will need: read the model's sizes, forecast, and say whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from dpo_cli.config.schema import AdamWConfig, Config, RMSpropConfig
from dpo_cli.config.shipped import choices
from dpo_cli.engine.environment import is_worker, world_size
from dpo_cli.errors import ModelError
from dpo_cli.forecast.cost import Disk, Work, forecast_disk, forecast_step
from dpo_cli.forecast.layout import Layout, LoraLayout, SamplingLayout
from dpo_cli.forecast.machine import Machine, find_machine
from dpo_cli.forecast.memory import Memory, forecast_memory
from dpo_cli.forecast.model_files import read_shape
from dpo_cli.forecast.remedies import Remedy, fits, remedies
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.forecast.traffic import Traffic, forecast_traffic


@dataclass(frozen=True)
class Plan:
    """A forecast, with all that it was made from. counted_from: where the number of parameters is known from.

    remedies: empty where the run fits, or nothing is known of the device.
    """

    model: str
    shape: ModelShape
    counted_from: str
    layout: Layout
    machine: Machine
    device_tflops: float | None
    memory: Memory
    disk: Disk
    step: Work
    traffic: Traffic
    remedies: tuple[Remedy, ...]

    @property
    def fits(self) -> bool | None:
        """None where nothing is known of the device."""
        return None if self.machine.device_bytes is None else fits(self.memory, self.machine.device_bytes)


def plan_run(config: Config, machine: Machine | None = None) -> Plan:
    """machine: what the run will use, where that is known already. Raises ModelError for a model without sizes."""
    hardware = config.hardware
    if machine is None:
        machine = find_machine(hardware.device, device_memory_gb=hardware.device_memory_gb)
        workers = world_size() if is_worker() else hardware.num_workers or machine.devices
    else:
        workers = machine.devices
    shape, counted_from = read_shape(config.model.path, config.model.revision)
    layout = layout_of(config, machine, workers=workers)
    memory = forecast_memory(shape, layout)
    proposed: list[Remedy] = []
    if machine.device_bytes is not None and not fits(memory, machine.device_bytes):
        proposed = remedies(shape, layout, device_bytes=machine.device_bytes, zero_groups=choices("hardware"))
    step = forecast_step(shape, layout, global_pairs=config.global_pairs)
    return Plan(
        model=config.model.path,
        shape=shape,
        counted_from=counted_from,
        layout=layout,
        machine=machine,
        device_tflops=hardware.device_tflops,
        memory=memory,
        disk=forecast_disk(shape, layout, keep_checkpoints=config.keep_checkpoints),
        step=step,
        traffic=forecast_traffic(shape, layout, micro_batches=step.micro_batches),
        remedies=tuple(proposed),
    )


def plan_or_nothing(config: Config, machine: Machine) -> Plan | None:
    """For a run that does not depend on it: None where a model does not tell its sizes."""
    try:
        return plan_run(config, machine)
    except ModelError:
        return None


# What DeepSpeed calls the bounds that a layout has.
_BOUNDS = {
    "reduce_bucket": ("reduce_bucket_size",),
    "prefetch_bucket": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "live_parameters": ("stage3_max_live_parameters", "max_live_parameters"),
    "sub_group": ("sub_group_size",),
    "reuse_distance": ("stage3_max_reuse_distance", "max_reuse_distance"),
}


def _bounds(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those that hardware.deepspeed sets; a number may be written 5e8."""
    options = overrides.get("zero_optimization")
    found: dict[str, Any] = {}
    for name, theirs in _BOUNDS.items():
        for key in theirs:
            value = options.get(key) if isinstance(options, Mapping) else None
            if isinstance(value, int | float) and value >= 0:
                found[name] = int(value)
    return found


def _sampling(config: Config) -> SamplingLayout | None:
    """Of the shipped loss that samples; what a loss of the user's own declares is known only when it is imported."""
    if config.loss.name != "pdpo" or not config.loss.parameters.get("gamma"):
        return None
    rollout = config.rollout
    return SamplingLayout(
        tokens=max(rollout.batch_tokens, config.data.max_tokens // 2 + rollout.max_new_tokens),
        longest=config.data.max_tokens // 2 + rollout.max_new_tokens,
        frozen_reference=config.model.lora is None or config.model.reference not in (None, "start"),
    )


def layout_of(config: Config, machine: Machine, *, workers: int) -> Layout:
    hardware = config.hardware
    model, optimizer, lora = config.model, config.optimizer, config.model.lora
    half = model.dtype in ("bfloat16", "float16") or (model.dtype == "auto" and machine.on_gpu)
    targets = None if lora is None else lora.target_modules
    layout = Layout(
        tokens=config.tokens_per_microbatch,
        longest=config.data.max_tokens,
        bytes_per_weight=2 if half else 4,
        gradient_checkpointing=model.gradient_checkpointing,
        checkpoint_every=model.checkpoint_every,
        offload_checkpoints=model.offload_checkpoints,
        lora=None
        if lora is None
        else LoraLayout(lora.rank, targets if isinstance(targets, str) else tuple(targets or ())),
        optimizer=optimizer.name,
        momentum=isinstance(optimizer, RMSpropConfig) and optimizer.momentum > 0,
        state_bits=optimizer.state_bits if isinstance(optimizer, AdamWConfig) else 32,
        on_gpu=machine.on_gpu,
        zero_stage=cast(Literal[0, 1, 2, 3] | None, hardware.zero_stage),
        workers=workers if hardware.is_distributed else 1,
        offload_optimizer=hardware.offload_optimizer if hardware.is_distributed else "none",
        offload_parameters=hardware.offload_parameters if hardware.is_distributed else "none",
        sampling=_sampling(config),
    )
    return replace(layout, **_bounds(hardware.deepspeed)) if hardware.zero_stage else layout
