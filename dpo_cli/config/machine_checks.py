"""What a machine, and how its devices are used, cannot do together with other settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_cli.errors import ConfigError

Values = Mapping[str, Any]
# What may be wrong with some values, and the keys it reads; asked only when every one of them is valid by itself.
Check = tuple[Callable[[Values], ConfigError | None], tuple[str, ...]]


def float16_needs_loss_scaling(values: Values) -> ConfigError | None:
    if values["model.dtype"] != "float16" or values["hardware.zero_stage"]:
        return None
    return ConfigError(
        "float16 gradients overflow without loss scaling, which only DeepSpeed does here.",
        where="model.dtype",
        hint="model.dtype=bfloat16 or auto; or, where a GPU has no bfloat16, hardware=deepspeed_zero2",
    )


def checkpoints_are_taken(values: Values) -> ConfigError | None:
    if values["model.gradient_checkpointing"]:
        return None
    for key, off in (("model.checkpoint_every", 1), ("model.offload_checkpoints", False)):
        if values[key] != off:
            return ConfigError(
                f"{key} says how checkpoints are taken, and model.gradient_checkpointing is off.",
                where=key,
                hint="model.gradient_checkpointing=true",
            )
    return None


def workers_need_deepspeed(values: Values) -> ConfigError | None:
    workers = values["hardware.num_workers"]
    if values["hardware.zero_stage"] is not None or workers in (None, 1):
        return None
    return ConfigError(
        f"hardware.num_workers is {workers}, and this hardware group computes in one process.",
        where="hardware.num_workers",
        hint=f"hardware=deepspeed_zero2 hardware.num_workers={workers}",
    )


def eight_bits_can_be_had(values: Values) -> ConfigError | None:
    if values["optimizer.state_bits"] != 8:
        return None
    if values["hardware.zero_stage"]:
        return ConfigError(
            "Optimiser states of 8 bits cannot be partitioned by ZeRO.",
            where="optimizer.state_bits",
            hint="optimizer.state_bits=32, or one device: hardware=single_gpu",
        )
    if find_spec("torchao") is None:
        return ConfigError(
            "Optimiser states of 8 bits need the package torchao, which is not installed.",
            where="optimizer.state_bits",
            hint='pip install "dpo-cli[8bit]", or optimizer.state_bits=32',
        )
    return None


def offloading_needs_its_stage(values: Values) -> ConfigError | None:
    stage = values["hardware.zero_stage"] or 0
    for key, least in (("hardware.offload_optimizer", 1), ("hardware.offload_parameters", 3)):
        if values[key] != "none" and stage < least:
            return ConfigError(
                f"{key}={values[key]} needs ZeRO stage {least} or higher.",
                where=key,
                hint=f"hardware=deepspeed_zero{least}, or {key}=none",
            )
    return None


def nvme_has_a_place(values: Values) -> ConfigError | None:
    if "nvme" not in (values["hardware.offload_optimizer"], values["hardware.offload_parameters"]):
        return None
    path = values["hardware.nvme_path"]
    if path is not None and Path(path).expanduser().is_dir():
        return None
    return ConfigError(
        "hardware.nvme_path names no folder to offload to."
        if path is None
        else f"There is no folder {path} to offload to.",
        where="hardware.nvme_path",
        hint="hardware.nvme_path=/local_nvme, a folder on a fast disk of each machine",
    )


# What this tool must decide itself, and the key to use instead.
_DECIDED_HERE = {
    "train_batch_size": "global_pairs",
    "train_micro_batch_size_per_gpu": "tokens_per_microbatch",
    "gradient_accumulation_steps": "tokens_per_microbatch",
    "managed_gradient_accumulation": "tokens_per_microbatch",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "model.dtype=bfloat16",
    "fp16.enabled": "model.dtype=float16",
    "optimizer": "the group optimizer",
    "scheduler": "optimizer.schedule",
    "zero_optimization.stage": "hardware.zero_stage",
    "zero_optimization.offload_optimizer.device": "hardware.offload_optimizer",
    "zero_optimization.offload_param.device": "hardware.offload_parameters",
}


def deepspeed_options_are_ours_to_leave(values: Values) -> ConfigError | None:
    options = values["hardware.deepspeed"]
    if options and not values["hardware.zero_stage"]:
        return ConfigError(
            "hardware.deepspeed has options, and DeepSpeed is not used.",
            where="hardware.deepspeed",
            hint="hardware=deepspeed_zero2, or leave them out",
        )
    for name, instead in _DECIDED_HERE.items():
        found: Any = options
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return ConfigError(
                f"hardware.deepspeed.{name} is decided by this tool.",
                where=f"hardware.deepspeed.{name}",
                hint=f"use {instead} instead",
            )
    return None


MACHINE_CHECKS: tuple[Check, ...] = (
    (float16_needs_loss_scaling, ("model.dtype", "hardware.zero_stage")),
    (
        checkpoints_are_taken,
        ("model.gradient_checkpointing", "model.checkpoint_every", "model.offload_checkpoints"),
    ),
    (workers_need_deepspeed, ("hardware.num_workers", "hardware.zero_stage")),
    (eight_bits_can_be_had, ("optimizer.state_bits", "hardware.zero_stage")),
    (offloading_needs_its_stage, ("hardware.offload_optimizer", "hardware.offload_parameters", "hardware.zero_stage")),
    (nvme_has_a_place, ("hardware.offload_optimizer", "hardware.offload_parameters", "hardware.nvme_path")),
    (deepspeed_options_are_ours_to_leave, ("hardware.deepspeed", "hardware.zero_stage")),
)
