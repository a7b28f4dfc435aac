"""Weights that may be partitioned over ranks, read whole, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

# Makes partitioned parameters whole on every rank while it is open.
Gathered = Callable[[Sequence[nn.Parameter]], AbstractContextManager[None]]


def whole_already(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    return nullcontext()


@torch.no_grad()
def whole_state_dict(
    model: nn.Module,
    gathered: Gathered = whole_already,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    companions: Callable[[str], Sequence[nn.Parameter]] = lambda name: (),
    value: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """A model's state dict on the CPU; tied weights stay one tensor.

    rename: an entry's name in the result; None leaves it out. companions: parameters that `value` needs whole beside
    the entry's own. value: what is kept of a whole tensor, by its name in the result.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for entry, tensor in model.state_dict(keep_vars=True).items():
        name = rename(entry)
        if name is None:
            continue
        if id(tensor) not in seen:
            needed = [part for part in (tensor, *companions(name)) if isinstance(part, nn.Parameter)]
            with gathered(needed):
                # A copy, also where it is on the CPU already: a gathered weight does not outlive its gathering.
                seen[id(tensor)] = value(name, tensor.detach()).to("cpu", copy=True)
        state[name] = seen[id(tensor)]
    return state
