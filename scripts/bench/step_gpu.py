"""The step benchmark on a GPU: its cases, and what the device could do at best."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from step_cases import WIDE, StepCase

from dpo_cli.forecast.peaks import peak_tflops

_QWEN2_05B: dict[str, Any] = {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv_heads": 2}
_QWEN2_15B: dict[str, Any] = {"hidden": 1536, "intermediate": 8960, "layers": 28, "heads": 12, "kv_heads": 2}
_QWEN2_7B: dict[str, Any] = {"hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "kv_heads": 4}
_SHARED: dict[str, Any] = {
    "vocabulary": WIDE, "dtype": "bfloat16", "device": "cuda", "warmup_steps": 3, "timed_steps": 8, "global_pairs": 32,
    "learning_rate": 1e-6,
}  # fmt: skip
_HALF_BILLION = StepCase("prompt-heavy", **_SHARED, **_QWEN2_05B, micro_pairs=8)
_1_5_BILLION = StepCase("prompt-heavy", **_SHARED, **_QWEN2_15B, micro_pairs=4, gradient_checkpointing=True)
_7_BILLION = StepCase(
    "prompt-heavy", **(_SHARED | {"vocabulary": 152_064}), **_QWEN2_7B, micro_pairs=4, gradient_checkpointing=True,
    tied=False, lora_rank=64,
)  # fmt: skip
GPU_CASES = {
    f"{model}, {words}": case
    for model, shape in (
        ("Qwen2-0.5B", _HALF_BILLION), ("Qwen2-1.5B, checkpointed", _1_5_BILLION),
        ("Qwen2-7B, checkpointed, LoRA", _7_BILLION),
    )
    for words, case in (
        ("prompt-heavy", shape), ("response-heavy", shape.of("response-heavy")), ("long", shape.of("long")),
    )
}  # fmt: skip


def gpu_sides() -> tuple[str, ...]:
    """TRL with the weights, the optimiser and the attention it can have on this machine."""
    return ("ours", "trl", *(("flash",) if find_spec("flash_attn") else ()), "half", "grouped")


def device_line() -> str:
    """The GPU, and the versions that its kernels come from."""
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    peak = peak_tflops(name)
    stated = f"{peak:g} TFLOP/s stated for bfloat16" if peak else "stated peak unknown"
    flash = "flash-attn is installed" if find_spec("flash_attn") else "flash-attn is not installed"
    return f"{name}, {memory:.0f} GiB, {stated}, CUDA {torch.version.cuda}, {flash}"
