"""The tokenised example: what the data room hands to batching, scoring and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """One prompt with its responses, as token ids.

    prompt: (prompt_tokens,) at least one token.
    responses: each (tokens,) at least one token; by kind of example
        pair           (chosen, rejected)
        ranked         K >= 2, best first
        unpaired       (the response, a response of another prompt for KTO's divergence estimate)
        demonstration  the response to imitate, then any worse ones (only evaluated, never trained on)
    weights: per-token weights beside `responses`, or None for all ones.
    desirable: KTO's verdict, None for other kinds.
    reference: precomputed reference log-probs that came with the row, one array a response, either per token
        (tokens,) or a single sum (1,); None where the reference is to be scored.
    origin: "file.jsonl row 17", for messages.
    """

    prompt: IntArray
    responses: tuple[IntArray, ...]
    weights: tuple[FloatArray, ...] | None = None
    desirable: bool | None = None
    reference: tuple[FloatArray, ...] | None = None
    origin: str = ""

    @property
    def packed_tokens(self) -> int:
        """Tokens in a packed row: the prompt once, every response once."""
        return len(self.prompt) + sum(map(len, self.responses))


class Examples(Protocol):
    """A memory-mapped collection of examples; indexing is cheap, holding it costs nothing per row but its sizes."""

    @property
    def sizes(self) -> IntArray:
        """(examples,) packed tokens of each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...
