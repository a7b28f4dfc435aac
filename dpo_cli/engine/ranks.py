"""The processes of one training, as the rest of the tool sees them: which one this is, and how they agree.

Every method that talks to the other ranks must be called by all of them, in the same order.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """rank counts from 0, size is how many there are; the main one, 0, alone writes what is written once."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool: ...
    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in rank order; small picklable things."""

    def broadcast(self, value: T) -> T:
        """The main rank's value."""

    def barrier(self) -> None: ...


class SoleRank:
    """One process: every agreement is with itself."""

    rank = 0
    size = 1
    is_main = True

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        return


class ProcessRanks:
    """The ranks of torch.distributed's default process group, which must have been initialised.

    Objects travel over a gloo group of their own: under NCCL they would go through GPU memory.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._objects: Any = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._objects)
        return values

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._objects)
        return values[0]

    def barrier(self) -> None:
        # A sum that is read back: an NCCL barrier only orders streams.
        self.gather(None)


def sum_floats(ranks: Ranks, *values: float) -> list[float]:
    """Sums over ranks of a few numbers, in one exchange between hosts: no device is waited for."""
    return [sum(theirs) for theirs in zip(*ranks.gather(values), strict=True)]
