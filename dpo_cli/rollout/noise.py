"""Random numbers that are functions of their place: of a seed, a step, a row, a sample, a token; of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 2**64 - 1


def stream(*parts: int) -> int:
    """One key of many numbers, such as (seed, step, row): a 64-bit word as a signed integer."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = mix(key + _signed(part))
    return int(key)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in the open interval (0, 1), (keys, positions) float64: those at these positions of each key's stream.

    keys, positions: (n,) and (m,) int64.
    """
    bits = mix(keys[:, None] + positions)
    return ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function over int64 tensors, which wrap around as its 64-bit words do.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15, the odd number nearest 2^64 / golden ratio
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    word &= _WORD
    return word - 2**64 if word >= 2**63 else word
