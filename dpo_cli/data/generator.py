"""The generator's share of the data: prompts, each with the one response that counts as its ground truth."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_cli.data.chunk import fraction
from dpo_cli.data.example import Example, Examples, IntArray


@dataclass(frozen=True)
class Selected:
    """Some examples of a collection, renumbered. indices: (examples,) their places there."""

    whole: Examples
    indices: NDArray[np.int64]

    @functools.cached_property
    def sizes(self) -> IntArray:
        return self.whole.sizes[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.whole[int(self.indices[index])]


class Truths:
    """Examples of which only the prompt and the first response, the ground truth, are left.

    Token weights are left out: on samples there are none to compare with.
    """

    def __init__(self, whole: Examples) -> None:
        self._whole = whole
        self.sizes: IntArray = np.array([self[i].packed_tokens for i in range(len(whole))], dtype=np.int32)
        self.prompt_tokens: IntArray = np.array([len(self[i].prompt) for i in range(len(whole))], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: int) -> Example:
        example = self._whole[index]
        reference = None if example.reference is None else example.reference[:1]
        return Example(example.prompt, example.responses[:1], reference=reference, origin=example.origin)


def split_by_prompt(
    prompt_keys: NDArray[np.int64], share: float, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ascending indices of the discriminator's examples, and of the generator's.

    prompt_keys: (examples,). share: of the distinct prompts, rounded, but at least one on either side where there are
    two. All examples of a prompt are on one side, which (prompt, seed) decides: further rows move few prompts.
    """
    prompts = np.unique(prompt_keys)
    wanted = min(max(round(share * len(prompts)), 1), len(prompts) - 1) if share else 0
    ranked = sorted(prompts.tolist(), key=lambda key: (fraction(seed, "generator", key), key))
    chosen = np.isin(prompt_keys, np.array(ranked[:wanted], dtype=np.int64))
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
