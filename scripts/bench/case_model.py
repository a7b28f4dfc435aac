"""The random weights of a case, the same on every side."""

from __future__ import annotations

from typing import Any

import torch
from step_cases import StepCase
from transformers import AutoModelForCausalLM, Qwen2Config


def model_of(case: StepCase, attention: str) -> Any:
    """Made on the case's device. Weights that are not trained are bfloat16 where the case is, the others float32."""
    dtype = torch.bfloat16 if case.lora_rank and case.dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    with torch.device(case.device):
        config = Qwen2Config(**case.model_config)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if case.dtype == "bfloat16":
        # Both sides start from weights that bfloat16 can hold, as they come in published models.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    return model.train()


def rounded(model: Any, dtype: torch.dtype) -> Any:
    """Weights of that dtype, and nothing else: rotations by angles of three digits would be another model's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def with_same_adapters(model: Any) -> None:
    """Their random halves anew, by a generator of their own: peft draws them from where the side's own stands."""
    generator = torch.Generator().manual_seed(0)
    halves = {name[name.index("layers.") :]: half for name, half in model.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        for _, half in sorted(halves.items()):
            half.copy_(torch.randn(half.shape, generator=generator) / half.shape[1] ** 0.5)
