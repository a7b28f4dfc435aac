"""Where a run computes: its ranks and device, how models are read and scored there, and the engine that trains."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from dpo_cli.engine.interface import Engine, OptimizerSettings
from dpo_cli.engine.ranks import ProcessRanks, Ranks, SoleRank
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.engine.zero import ZeroEngine, gathered_weights, import_deepspeed, partitioned_loading, partitioned_scoring
from dpo_cli.engine.zero_config import ZeroSettings, deepspeed_config

# Data are prepared before the ranks meet; what keeps one busy after that (a slow disk, a large checkpoint) is no hang.
_PATIENCE = datetime.timedelta(hours=6)


class Backend(Protocol):
    ranks: Ranks
    device: torch.device

    def reading(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """While open, models are read as this backend holds them."""

    def scoring(self, packed: nn.Module, dtype: torch.dtype) -> AbstractContextManager[nn.Module]:
        """A model for forward passes alone; afterwards its memory can be given back."""

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, every rank holds a whole model that was read under `reading`, to generate with."""

    def training(self, packed: nn.Module, model: nn.Module, settings: OptimizerSettings, dtype: torch.dtype) -> Engine:
        """The engine that trains `model`, seen through `packed`."""


class Replicated:
    """The whole model on every rank, of which there may be one."""

    def __init__(self, device: torch.device, ranks: Ranks | None = None) -> None:
        self.device = device
        self.ranks: Ranks = ranks or SoleRank()

    def reading(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return nullcontext()

    def scoring(self, packed: nn.Module, dtype: torch.dtype) -> AbstractContextManager[nn.Module]:
        return nullcontext(packed)

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def training(self, packed: nn.Module, model: nn.Module, settings: OptimizerSettings, dtype: torch.dtype) -> Engine:
        return ReplicatedEngine(packed, model, settings, self.ranks)


class Partitioned:
    """Partitioned over ranks by DeepSpeed's ZeRO. Raises ConfigError where DeepSpeed is not installed."""

    def __init__(self, device: torch.device, ranks: Ranks, zero: ZeroSettings) -> None:
        self.device, self.ranks = device, ranks
        self._zero = zero
        import_deepspeed(device)

    def reading(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        if self._zero.stage < 3:
            return nullcontext()
        return partitioned_loading(self._config(dtype))

    def scoring(self, packed: nn.Module, dtype: torch.dtype) -> AbstractContextManager[nn.Module]:
        if self._zero.stage < 3:
            return nullcontext(packed)
        return partitioned_scoring(packed, self._config(dtype))

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self._zero.stage < 3 else gathered_weights(model)

    def training(self, packed: nn.Module, model: nn.Module, settings: OptimizerSettings, dtype: torch.dtype) -> Engine:
        return ZeroEngine(packed, model, settings, zero=self._zero, dtype=dtype, device=self.device, ranks=self.ranks)

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        """For forward passes alone."""
        return deepspeed_config(self._zero, dtype=dtype, device=self.device, max_grad_norm=None, ranks=self.ranks.size)


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """The ranks that a launcher has started, told by its environment; they meet here and part at the end."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield ProcessRanks()
    finally:
        dist.destroy_process_group()
