"""Between two reports the host asks the device for nothing but, once a step, the loss and what travels with it."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

from dpo_cli.data.example import Example
from dpo_cli.engine.interface import OptimizerSettings
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.losses.aot import aot_loss
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.kto import kto_loss
from dpo_cli.losses.pdpo import pdpo_loss
from dpo_cli.losses.plackett_luce import plackett_luce_loss
from dpo_cli.losses.sft_ref import sft_ref_loss
from dpo_cli.policy.attention_routes import PLAIN, AttentionRoute, choose_attention
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.train.batch_loss import BatchLoss
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.micro_batch import MicroBatch
from dpo_cli.train.objective import Objective

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "llama": LlamaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
}
LOSSES: dict[str, tuple[Callable[..., Any], int, int]] = {
    "dpo": (functools.partial(dpo_loss, beta=0.1), 2, 0),
    "kto": (functools.partial(kto_loss, beta=0.1), 2, 0),
    "aot": (functools.partial(aot_loss, beta=0.1), 2, 0),
    "sft_ref": (sft_ref_loss, 2, 0),
    "plackett_luce": (functools.partial(plackett_luce_loss, beta=0.1), 3, 0),
    "pdpo": (
        functools.partial(pdpo_loss, beta=0.1, gamma=0.5, generator="policy_gradient", baseline="leave_one_out"), 2, 3,
    ),
}  # fmt: skip


class Waits(TorchDispatchMode):
    """The operations whose result, or its size, only the device knows, and the host must have."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        by_mask = name in ("index", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or name.startswith(self.NAMES):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def micro_batches(responses: int, samples: int) -> list[MicroBatch]:
    rng = np.random.default_rng(0)

    def ids() -> Any:
        return rng.integers(3, 61, rng.integers(2, 12)).astype(np.int32)

    def micro() -> MicroBatch:
        examples = [
            Example(ids(), tuple(ids() for _ in range(responses)), desirable=number % 2 == 0) for number in range(4)
        ]
        drawn = [Example(ids(), tuple(ids() for _ in range(1 + samples))) for _ in range(2)] if samples else []
        all_of_them = (*examples, *drawn)
        sums = tuple(rng.normal(-30, 3, len(example.responses)) for example in all_of_them)
        return MicroBatch(all_of_them, sums, drawn=(tuple(range(1, 1 + samples)),) * len(drawn))

    return [micro() for _ in range(3)]


class Steps:
    def __init__(self, config: Any, loss: str, device: torch.device, route: AttentionRoute = PLAIN) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=dtype).to(device)
        function, responses, samples = LOSSES[loss]
        packed = PackedModel(model, attention=route)
        self.engine = ReplicatedEngine(packed, model, OptimizerSettings("adamw", weight_decay=0.1, max_grad_norm=1.0))
        self.loss = BatchLoss(packed, Objective.of(function), device)
        self.micros, self.window = micro_batches(responses, samples), MetricSums()

    def accumulate(self) -> None:
        self.outcome = self.loss.accumulate_gradient(self.micros, self.engine)
        self.window.merge(self.outcome.metrics)

    def step(self) -> None:
        result = self.engine.step(1e-3, self.outcome.loss, (self.outcome.tokens, False))
        assert result.sound
        self.window.add("loss", torch.full((), result.loss, device=self.loss.device))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_never_wait(architecture: str, loss: str) -> None:
    steps = Steps(CONFIGS[architecture], loss, torch.device("cpu"))
    for _ in range(2):
        with Waits() as waits:
            steps.accumulate()
        assert waits.seen == []
        steps.step()
    assert math.isfinite(steps.window.means()["loss"])


@contextmanager
def synchronisations(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("route", ["auto", "sdpa"])
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_gpu_only_a_step_s_end_synchronises(architecture: str, loss: str, route: str) -> None:
    device, config = torch.device("cuda"), CONFIGS[architecture]
    chosen = choose_attention(route, config, device=device, dtype=torch.bfloat16)
    steps = Steps(config, loss, device, chosen)
    for step in range(3):
        if step == 0:
            # Libraries are set up at their first use.
            steps.accumulate()
        else:
            with synchronisations("error"):
                steps.accumulate()
        with warnings.catch_warnings(record=True) as warned, synchronisations("warn"):
            warnings.simplefilter("always")
            steps.step()
        # One list of numbers: the loss, what travels with it, and the gradient's norm.
        assert step == 0 or sum("synchronizing" in str(warning.message) for warning in warned) == 1
    assert math.isfinite(steps.window.means()["loss"])
