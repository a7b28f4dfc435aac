"""The whole model on every rank: backward, clipping and the optimiser step, with float32 master weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dpo_cli.engine.eight_bit import plain_tensors, whole_states
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
    set_learning_rate,
    sums_over_ranks,
)
from dpo_cli.engine.ranks import Ranks, SoleRank

# Gradients are exchanged in pieces of about this size: large enough for the network, small enough beside the model.
_BUCKET_BYTES = 64 * 2**20


class ReplicatedEngine:
    """Owns the trainable parameters of a model: their master copies, gradients and optimiser.

    bf16 keeps 8 bits of mantissa: an update of lr 5e-7 is lost in it. Gradients are therefore accumulated, and weights
    moved, in float32 masters, of which the bf16 weights are a rounded copy. Float32 weights are their own masters.
    With several ranks their gradients are summed before the step, and every rank makes the same one.
    """

    def __init__(
        self, packed: nn.Module, model: nn.Module, settings: OptimizerSettings, ranks: Ranks | None = None
    ) -> None:
        """packed: called for every forward pass; model: the part of it whose parameters are trained and saved."""
        self.model = packed
        self._ranks: Ranks = ranks or SoleRank()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else p.detach().float().requires_grad_()
            for name, p in self._parameters.items()
        }
        self._settings = settings
        self._optimizer = optimizer_for(self._masters, settings, fused=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            if parameter is master or parameter.grad is None:
                continue
            # Added as it is: the sum is float32, and a widened copy of an embedding's gradient is a large one.
            master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
            parameter.grad = None

    def step(self, learning_rate: float, loss: Tensor, beside: Sequence[float] = ()) -> StepResult:
        self._sum_gradients()
        norm = self._gradient_norm()
        # The one host-device synchronisation of a step.
        total, *others = torch.cat((sums_over_ranks(self._ranks, loss, beside), norm.double()[None])).tolist()
        result = StepResult(total, others.pop(), beside=tuple(others))
        if result.sound:
            if self._settings.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self._masters.values(), self._settings.max_grad_norm, norm)
            set_learning_rate(self._optimizer.param_groups, learning_rate)
            self._optimizer.step()
            self._publish()
        self.forget_gradient()
        return result

    def is_finite(self, loss: Tensor) -> bool:
        self.forget_gradient()
        self.backward(loss)
        norm = self._gradient_norm()
        self.forget_gradient()
        return bool(torch.isfinite(loss) and torch.isfinite(norm))

    def forget_gradient(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def saved_bytes(self) -> int:
        return saved_bytes(self._masters, self._settings)

    def saved_tensors(self) -> Iterator[SavedTensor]:
        for number, (name, master) in enumerate(self._masters.items()):
            if number % self._ranks.size != self._ranks.rank:
                continue
            yield SavedTensor(WEIGHTS, name, master.detach())
            for key, value in self._optimizer.state.get(master, {}).items():
                for part, tensor in plain_tensors(key, value) if isinstance(value, Tensor) else ():
                    yield SavedTensor(OPTIMIZER, f"{name}/{part}", tensor)

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        check_names(weights, self._masters)
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(checked_shape(name, weights[name], master.shape))
        # A step counter lives where the optimiser puts it: on the host, unless the optimiser is fused.
        fused = self._settings.name == "adamw" and self._settings.state_bits == 32
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for path in optimizer:
            name, key = path.rsplit("/", 1)
            by_parameter.setdefault(name, {})[key] = optimizer[path]
        for name, entries in by_parameter.items():
            master = self._masters[name]
            states = whole_states(entries, master.device)
            if fused:
                states["step"] = states["step"].to(master.device)
            self._optimizer.state[master] = states
        self._publish()

    def close(self) -> None:
        self._optimizer.state.clear()
        self.forget_gradient()

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def whole_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _gradient_norm(self) -> Tensor:
        """Global 2-norm of the accumulated gradient, a 0-d tensor on the device."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _sum_gradients(self) -> None:
        if self._ranks.size == 1:
            return
        for bucket in _buckets(list(self._masters.values())):
            # A rank whose micro-batches did not touch a parameter takes part with zeros.
            flat = torch.cat(
                [(torch.zeros_like(master) if master.grad is None else master.grad).reshape(-1) for master in bucket]
            )
            self._ranks.sum(flat)
            for master, part in zip(bucket, flat.split([master.numel() for master in bucket]), strict=True):
                master.grad = part.view_as(master)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            if parameter is not master:
                parameter.copy_(master)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
