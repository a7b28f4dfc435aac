"""The random weights of a case, the same on every side."""

from __future__ import annotations

from typing import Any

import torch
from step_cases import StepCase
from transformers import AutoModelForCausalLM, Qwen2Config


def model_of(case: StepCase, attention: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**case.model_config), attn_implementation=attention)
    if case.dtype == "bfloat16":
        # Both sides start from weights that bfloat16 can hold, as they come in published models.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    return model.train()
