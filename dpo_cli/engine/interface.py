"""What the training loop asks of an engine, whatever stands behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpo_cli.engine.eight_bit import adamw_8bit
from dpo_cli.engine.ranks import Ranks
from dpo_cli.errors import CheckpointError

WEIGHTS, OPTIMIZER = "policy", "optimizer"


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimiser, with what. Learning rates come with every step, not from here.

    weight_decay: decoupled for AdamW, L2 for RMSprop; matrices only, as norms and biases have no scale to decay to.
    max_grad_norm: the global gradient norm is clipped to this; None never clips.
    state_bits: of each number in AdamW's moments.
    """

    name: Literal["adamw", "rmsprop"]
    weight_decay: float
    max_grad_norm: float | None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    alpha: float = 0.99
    momentum: float = 0.0
    state_bits: Literal[8, 32] = 32


@dataclass(frozen=True)
class StepResult:
    """The loss of the global batch, and the norm of its gradient before clipping.

    Weights are moved only where both are finite. rescaled: float16 gradients overflowed and will be scaled down from
    now on, which is no error. beside: the sums over ranks of what travelled with the loss.
    """

    loss: float
    gradient_norm: float
    rescaled: bool = False
    beside: tuple[float, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether training may go on."""
        return math.isfinite(self.loss) and (math.isfinite(self.gradient_norm) or self.rescaled)


class SavedTensor(NamedTuple):
    """A whole tensor of a checkpoint: a float32 weight of group "policy", or a state of group "optimizer".

    name: the parameter's, followed in the optimiser's group by "/" and the state's: "<parameter>/exp_avg".
    """

    group: str
    name: str
    tensor: Tensor


class Engine(Protocol):
    """Gradients, optimiser and weights of one model on one or many ranks.

    Losses given to `backward` are shares of the global batch's mean: their sum over micro-batches and ranks is it.
    Under several ranks every method must be called by all of them, equally often.
    """

    @property
    def model(self) -> nn.Module:
        """The packed model, to be called for every forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a share of the global loss, in float32."""

    def step(self, learning_rate: float, loss: Tensor, beside: Sequence[float] = ()) -> StepResult:
        """Clip to the configured norm, move the weights, forget the gradient.

        loss: this rank's share of the global loss, 0-d. Where it or the gradient is not finite, nothing moves.
        beside: further numbers to sum over ranks, in the exchange that the loss needs anyway.
        """

    def is_finite(self, loss: Tensor) -> bool:
        """Whether this loss, and its gradient as far as that can be had alone, are finite; forgets all gradients."""

    def forget_gradient(self) -> None: ...

    @property
    def saved_bytes(self) -> int:
        """The size of everything that `saved_tensors` gives on all ranks together."""

    def saved_tensors(self) -> Iterator[SavedTensor]:
        """What a checkpoint holds of the weights and the optimiser: this rank's share of it, whole tensors."""

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Put back what the `saved_tensors` of all ranks were. Raises CheckpointError on other names or shapes."""

    def close(self) -> None:
        """Give back the memory that the model itself does not need."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """While it is open every rank holds these parameters whole."""

    def whole_weights(self) -> AbstractContextManager[None]:
        """While it is open every rank holds the whole model, to generate with."""


def sums_over_ranks(ranks: Ranks, loss: Tensor, beside: Sequence[float]) -> Tensor:
    """(1 + len(beside),) float64: the loss and what travels with it, summed in one exchange."""
    mine = loss.detach().double()
    # Filled on the device: numbers that are copied there would make the host wait.
    return ranks.sum(torch.stack([mine, *(torch.full_like(mine, value) for value in beside)]))


def optimizer_for(
    parameters: Mapping[str, nn.Parameter | Tensor], settings: OptimizerSettings, *, fused: bool
) -> torch.optim.Optimizer:
    """A torch optimiser with weight decay for matrices only; its learning rate is set before every step."""
    matrices = [tensor for tensor in parameters.values() if len(whole_shape(tensor)) >= 2]
    vectors = [tensor for tensor in parameters.values() if len(whole_shape(tensor)) < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.state_bits == 8:
        return adamw_8bit(groups, betas=settings.betas, eps=settings.eps)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)
    return torch.optim.RMSprop(
        groups, lr=0.0, alpha=settings.alpha, eps=settings.eps, momentum=settings.momentum, foreach=True
    )


def set_learning_rate(groups: list[dict[str, Any]], learning_rate: float) -> None:
    """groups: of an optimiser's parameters. One that is compiled keeps it in a tensor."""
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def state_names(settings: OptimizerSettings) -> tuple[str, ...]:
    """The optimiser's states that are as large as the weights."""
    if settings.name == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("square_avg", "momentum_buffer") if settings.momentum else ("square_avg",)


def saved_bytes(parameters: Mapping[str, Tensor], settings: OptimizerSettings) -> int:
    """What float32 weights and the optimiser's states of these parameters take."""
    each = 4 + len(state_names(settings)) * settings.state_bits // 8
    return each * sum(math.prod(whole_shape(p)) for p in parameters.values())


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where this rank holds only a part of it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def check_names(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a checkpoint's weights are exactly those of the parameters in training."""
    differing = sorted(set(weights) ^ set(parameters))
    if differing:
        raise CheckpointError(
            f"The checkpoint's weights are not this model's: {len(differing)} names differ, first {differing[0]}."
        )


def checked_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise CheckpointError(
            f"The checkpoint's weights are not this model's: {name} is {tuple(tensor.shape)} there and "
            f"{tuple(shape)} here."
        )
    return tensor
