"""AdamW whose two moments are kept in 8 bits, a quarter of their memory: torchao's, after arXiv:2110.02861.

Blocks of 256 entries share a scale, and 256 steps between -1 and 1 stand closer together near 0. Tensors of fewer than
4,096 entries, and those that blocks do not divide, keep moments in 32 bits. Compiled at the first step, once a shape.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_cli.errors import ConfigError


def adamw_8bit(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Raises ConfigError where torchao is not installed, or has it not."""
    try:
        kind = importlib.import_module("torchao.optim").AdamW8bit
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"Optimiser states of 8 bits need torchao: {error}.",
            where="optimizer.state_bits",
            hint='pip install "dpo-cli[8bit]", or optimizer.state_bits=32',
        ) from error
    # Of a cache that torch.compile goes without; it would be shown once a run.
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0, betas=betas, eps=eps)
    return optimizer


def plain_tensors(key: str, state: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A state as what a checkpoint can hold: its codes, their scales and what each code stands for, or itself."""
    flatten = getattr(state, "__tensor_flatten__", None)
    if flatten is None:
        yield key, state
        return
    for part in flatten()[0]:
        yield f"{key}.{part}", getattr(state, part)


def whole_states(saved: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The states of one parameter from its plain tensors."""
    states = {key: tensor.to(device).clone() for key, tensor in saved.items() if key != "step" and "." not in key}
    if "step" in saved:
        states["step"] = saved["step"].clone()
    for key in sorted({key.partition(".")[0] for key in saved if "." in key}):
        kind = importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
        parts = (saved[f"{key}.{part}"].to(device).clone() for part in ("codes", "scale", "qmap"))
        # The first moment has a sign, the second has none.
        states[key] = kind(*parts, signed=key == "exp_avg", dtype=torch.float32)
    return states
