"""Backward, clipping and the optimiser step on one device, with float32 master weights under half precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpo_cli.errors import CheckpointError


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimiser, with what. Learning rates come with every step, not from here.

    weight_decay: decoupled for AdamW, L2 for RMSprop; matrices only, as norms and biases have no scale to decay to.
    max_grad_norm: the global gradient norm is clipped to this; None never clips.
    """

    name: Literal["adamw", "rmsprop"]
    weight_decay: float
    max_grad_norm: float | None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    alpha: float = 0.99
    momentum: float = 0.0


class SingleDeviceEngine:
    """Owns the trainable parameters of a model: their master copies, gradients and optimiser.

    bf16 keeps 8 bits of mantissa: an update of lr 5e-7 is lost in it. Gradients are therefore accumulated, and weights
    moved, in float32 masters, of which the bf16 weights are a rounded copy. Float32 weights are their own masters.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_()
            for name, p in self._parameters.items()
        }
        self._settings = settings
        self._optimizer = _build_optimizer(self._masters.values(), settings)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`, which is already a share of the global mean."""
        loss.backward()
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            if parameter is master or parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of the accumulated gradient, a 0-d tensor on the device."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """Clip to the configured norm, move the weights, forget the gradient."""
        if self._settings.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self._settings.max_grad_norm, gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._publish()
        self.forget_gradient()

    def forget_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """Master weights by parameter name."""
        return {name: master.detach() for name, master in self._masters.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimiser state as flat tensors: "<parameter>/exp_avg", "<parameter>/step", ..."""
        state = self._optimizer.state
        return {
            f"{name}/{key}": value
            for name, master in self._masters.items()
            for key, value in state.get(master, {}).items()
            if isinstance(value, Tensor)
        }

    def load(self, weights: Mapping[str, Tensor], optimizer_tensors: Mapping[str, Tensor]) -> None:
        """Put back what `weights()` and `optimizer_tensors()` gave. Raises CheckpointError on other names or shapes."""
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        expected = {name: tuple(master.shape) for name, master in self._masters.items()}
        if found != expected:
            differing = sorted(set(found.items()) ^ set(expected.items()))
            raise CheckpointError(
                f"The checkpoint's weights are not this model's: {len(differing)} names or shapes differ, "
                f"first {differing[0][0]}."
            )
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(weights[name])
        fused = self._settings.name == "adamw"
        by_parameter: dict[str, dict[str, Any]] = {}
        for path, value in optimizer_tensors.items():
            name, key = path.rsplit("/", 1)
            by_parameter.setdefault(name, {})[key] = value
        for name, entries in by_parameter.items():
            master = self._masters[name]
            self._optimizer.state[master] = {
                # A step counter lives where the optimiser puts it: on the host, unless the optimiser is fused.
                key: value.clone() if key == "step" and not fused else value.to(master.device).clone()
                for key, value in entries.items()
            }
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            if parameter is not master:
                parameter.copy_(master)


def _build_optimizer(masters: Iterable[nn.Parameter | Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    masters = list(masters)
    matrices = [master for master in masters if master.ndim >= 2]
    vectors = [master for master in masters if master.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)
    return torch.optim.RMSprop(
        groups, lr=0.0, alpha=settings.alpha, eps=settings.eps, momentum=settings.momentum, foreach=True
    )
