"""DeepSpeed's configuration, from ours: what this tool decides, what may be set freely, and how they are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

# Gradients that are reduced at once, at most. DeepSpeed's own default is five times that, which it holds two to four
# times over, in float32; a network is busy with much less.
BUCKET_ELEMENTS = 100_000_000

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class ZeroSettings:
    """What is partitioned over ranks (1: optimiser, 2: gradients too, 3: weights too), and what leaves the device.

    nvme_path: a folder on a fast disk, for what is offloaded to "nvme".
    overrides: further options under DeepSpeed's own names; they win over ours.
    """

    stage: int
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    nvme_path: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def deepspeed_config(
    zero: ZeroSettings,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_grad_norm: float | None,
    ranks: int,
    trained: int | None = None,
) -> dict[str, Any]:
    """The dictionary that deepspeed.initialize takes.

    Gradients are summed and kept in float32 whatever the weights' dtype, and reduced where we say that a step ends:
    the number of micro-batches differs from step to step. trained: elements of the parameters in training; buckets
    larger than all of them would only take memory.
    """
    sections: dict[str, Any] = {
        "stage": zero.stage,
        # The memory-efficient linear layer rounds otherwise than torch's own: log-probs would differ between layouts.
        "memory_efficient_linear": False,
        **_offload("offload_optimizer", zero.offload_optimizer, zero.nvme_path, device),
    }
    if zero.stage == 3:
        sections |= _offload("offload_param", zero.offload_parameters, zero.nvme_path, device)
    if trained is not None:
        sections["reduce_bucket_size"] = min(trained, BUCKET_ELEMENTS)
    ours: dict[str, Any] = {
        # Nominal: batches are cut by tokens, and losses arrive divided already.
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": sections,
        # torch's optimisers are as fast, need no compiler, and are the same on every engine.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Under stage 1, rounded gradients would else stay beside their float32 sum until the step.
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    return merged(ours, zero.overrides)


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, of which the second wins."""
    result = dict(ours)
    for name, value in theirs.items():
        mine = result.get(name)
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            value = merged(mine, value)
        result[name] = value
    return result


def _offload(name: str, place: Place, nvme_path: str | None, device: torch.device) -> dict[str, Any]:
    if place == "none":
        return {}
    section: dict[str, Any] = {"device": place, "pin_memory": device.type == "cuda"}
    if place == "nvme":
        section["nvme_path"] = nvme_path
    return {name: section}
