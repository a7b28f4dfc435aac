"""DeepSpeed's ZeRO behind the engine interface: optimiser, gradients and weights partitioned over ranks."""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpo_cli.engine.interface import (
    OPTIMIZER,
    WEIGHTS,
    OptimizerSettings,
    SavedTensor,
    StepResult,
    check_names,
    checked_shape,
    optimizer_for,
    saved_bytes,
    state_names,
    sums_over_ranks,
    whole_shape,
)
from dpo_cli.engine.ranks import Ranks
from dpo_cli.engine.zero_config import ZeroSettings, deepspeed_config
from dpo_cli.errors import CheckpointError, ConfigError

# Where each of DeepSpeed's optimisers keeps its flat float32 masters: stages 1 and 2, stage 3, and stage 1 in bf16.
_FLAT_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed on the ranks that have met already, quiet and without anything to compile.

    Raises ConfigError where it is not installed.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    try:
        import deepspeed

        backend: Any = importlib.import_module("deepspeed.comm.torch")
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported: {error}.", where="hardware", hint='pip install "dpo-cli[deepspeed]"'
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Of functions that DeepSpeed calls, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory reduction for CPUs would be compiled at first use, for a minute and more, under a lock that
    # outlives a killed process, and leaves files in /dev/shm. gloo does the same work.
    backend.build_shm_op = lambda: None
    # Its optimiser for bfloat16 under stage 1 prints the memory in use, whatever the log level.
    bf16_optimizer: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed


class ZeroEngine:
    """A model in training under ZeRO stage 1, 2 or 3.

    DeepSpeed averages gradients over ranks, and leaves the weights alone where their norm is not finite.
    """

    def __init__(
        self,
        packed: nn.Module,
        model: nn.Module,
        settings: OptimizerSettings,
        *,
        zero: ZeroSettings,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """packed: called for every forward pass; model: the part of it whose parameters are trained and saved."""
        deepspeed = import_deepspeed(device)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._everything = list(model.parameters())
        self._settings, self._stage, self._ranks = settings, zero.stage, ranks
        self._deepspeed = deepspeed
        self._half = dtype == torch.float16
        if self._half and device.type == "cpu":
            raise ConfigError("float16 cannot be trained on a CPU.", where="model.dtype", hint="model.dtype=float32")
        on_host = zero.offload_optimizer != "none"
        self.model, *_ = deepspeed.initialize(
            model=packed,
            optimizer=optimizer_for(self._parameters, settings, fused=settings.name == "adamw" and not on_host),
            config=deepspeed_config(
                zero,
                dtype=dtype,
                device=device,
                max_grad_norm=settings.max_grad_norm,
                ranks=ranks.size,
                trained=sum(math.prod(whole_shape(p)) for p in self._parameters.values()),
            ),
            dist_init_required=False,
        )
        self._zero: Any = self.model.optimizer
        self._on_nvme = zero.offload_optimizer == "nvme"
        if not self._on_nvme:
            self._make_states()

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self._ranks.size, scale_wrt_gas=False)

    def step(self, learning_rate: float, loss: Tensor, beside: Sequence[float] = ()) -> StepResult:
        total, *others = sums_over_ranks(self._ranks, loss, beside).tolist()
        if not math.isfinite(total):
            self.forget_gradient()
            return StepResult(total, float("nan"), beside=tuple(others))
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self.model.step()
        overflowed = self._half and bool(self._zero.overflow)
        norm = float(self.model.get_global_grad_norm())
        return StepResult(total, norm, rescaled=overflowed, beside=tuple(others))

    def is_finite(self, loss: Tensor) -> bool:
        # One example's gradient cannot be had without the other ranks taking part in its reduction.
        return bool(torch.isfinite(loss))

    def forget_gradient(self) -> None:
        self._zero.zero_grad(set_to_none=True)

    @property
    def saved_bytes(self) -> int:
        return saved_bytes(self._parameters, self._settings)

    def saved_tensors(self) -> Iterator[SavedTensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for number, (name, parameter) in enumerate(self._parameters.items()):
            mine = number % self._ranks.size == self._ranks.rank
            weight = safe_get_full_fp32_param(parameter)
            if mine:
                yield SavedTensor(WEIGHTS, name, _whole(weight, parameter))
            for key in state_names(self._settings):
                state = safe_get_full_optimizer_state(parameter, key)
                if mine:
                    yield SavedTensor(OPTIMIZER, f"{name}/{key}", _whole(state, parameter))
            if mine:
                yield SavedTensor(OPTIMIZER, f"{name}/step", self._steps_taken())

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        check_names(weights, self._parameters)
        if self._on_nvme:
            # DeepSpeed makes those states in the first step, and there is nothing to fill before.
            raise CheckpointError(
                "A run whose optimiser states lie on NVMe cannot go on from a checkpoint.",
                where="hardware.offload_optimizer",
                hint="hardware.offload_optimizer=cpu",
            )
        steps = [path for path in optimizer if path.rsplit("/", 1)[1] == "step"]
        for state in self._states().values():
            state["step"].fill_(optimizer[steps[0]] if steps else 0)
        for name, parameter in self._parameters.items():
            weight = checked_shape(name, weights[name], whole_shape(parameter)).to(self.model.device)
            self._set(parameter, weight)
            # The copy that computes is another than the float32 master.
            with self._gathered([parameter], for_writing=True), torch.no_grad():
                parameter.copy_(weight)
            for key in state_names(self._settings) if optimizer else ():
                self._set(parameter, optimizer[f"{name}/{key}"].to(self.model.device), key)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set the float32 master of a parameter, or a state of its optimiser, from the whole tensor."""
        from deepspeed import utils

        if self._stage == 3:
            # DeepSpeed's own function for whole tensors knows no padding: it fails where ranks do not divide the size.
            partitioned: Any = parameter
            share: int = partitioned.ds_tensor.numel()
            flat = value.reshape(-1)
            mine = torch.zeros(share, dtype=flat.dtype, device=flat.device)
            part = flat[self._ranks.rank * share : (self._ranks.rank + 1) * share]
            mine[: len(part)] = part
            if key is None:
                utils.safe_set_local_fp32_param(parameter, mine)
            else:
                utils.safe_set_local_optimizer_state(parameter, mine, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def close(self) -> None:
        self.model.destroy()

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return self._gathered(parameters, for_writing=False)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        with self._gathered(self._everything, for_writing=False), _without_hooks(self.model):
            yield

    def _gathered(self, parameters: Sequence[nn.Parameter], *, for_writing: bool) -> AbstractContextManager[None]:
        if self._stage < 3:
            return nullcontext()
        return cast(
            AbstractContextManager[None],
            self._deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if for_writing else None),
        )

    def _flat_masters(self) -> list[Tensor]:
        return next(list(getattr(self._zero, name)) for name in _FLAT_MASTERS if hasattr(self._zero, name))

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        states: dict[Tensor, dict[str, Any]] = self._zero.optimizer.state
        return states

    def _steps_taken(self) -> Tensor:
        return torch.tensor(float(next(iter(self._states().values()))["step"]))

    def _make_states(self) -> None:
        """The states that the first step would make. DeepSpeed looks for all groups' when it has made one's."""
        fused = any(group.get("fused") for group in self._zero.param_groups)
        for master in self._flat_masters():
            step = torch.zeros((), device=master.device if fused else "cpu")
            empty = {name: torch.zeros_like(master) for name in state_names(self._settings)}
            self._states()[master] = {"step": step, **empty}
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """While open, modules run without what DeepSpeed does before and after each of them.

    It notes the order in which modules run, to fetch weights ahead. Ranks that generate responses of different length
    would note different orders, and fetch different weights in their next step.
    """
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in model.modules()]

    def others(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
        named = ((number, hook, getattr(hook, "__module__", "") or "") for number, hook in hooks.items())
        return OrderedDict((number, hook) for number, hook, module in named if not module.startswith("deepspeed"))

    for module, before, after in kept:
        module._forward_pre_hooks, module._forward_hooks = others(before), others(after)
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after


def _whole(tensor: Tensor | None, parameter: nn.Parameter) -> Tensor:
    if tensor is None:
        raise RuntimeError("DeepSpeed keeps no float32 master of a parameter in training")
    return tensor.detach().reshape(whole_shape(parameter)).cpu()


@contextmanager
def partitioned_scoring(packed: nn.Module, config: Mapping[str, Any]) -> Iterator[nn.Module]:
    """A model whose weights are partitioned, for forward passes alone (ZeRO stage 3)."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=packed, config=dict(config), dist_init_required=False)
    try:
        yield engine
    finally:
        engine.destroy()


def gathered_weights(model: nn.Module) -> AbstractContextManager[None]:
    """While open, every rank holds all weights of a model that was read partitioned (ZeRO stage 3)."""
    import deepspeed

    return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(list(model.parameters())))


@contextmanager
def partitioned_loading(config: Mapping[str, Any]) -> Iterator[None]:
    """While open, from_pretrained keeps of every parameter only this rank's part (ZeRO stage 3)."""
    from transformers.integrations import HfDeepSpeedConfig

    # transformers holds it by a weak reference: it must live as long as models are read.
    alive = HfDeepSpeedConfig(dict(config))
    try:
        yield
    finally:
        del alive
