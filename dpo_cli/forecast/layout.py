"""How a run is laid out over devices, as far as its memory is concerned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo_cli.batch.blocks import cut_queries, is_cut

Place = Literal["none", "cpu", "nvme"]
# Gradients that the engine exchanges at once under ZeRO, in elements.
REDUCE_BUCKET = 100_000_000


@dataclass(frozen=True)
class LoraLayout:
    """Adapters in training: their rank, and on which of a layer's matrices they are."""

    rank: int
    targets: str | tuple[str, ...] = "all-linear"


@dataclass(frozen=True)
class SamplingLayout:
    """A policy that writes its own responses in training: prompt and response tokens that are in its cache at once.

    longest: of a prompt with its response. frozen_reference: a copy of the reference stays in memory to score them.
    """

    tokens: int
    longest: int
    frozen_reference: bool


@dataclass(frozen=True)
class Layout:
    """zero_stage: None for a single device, 0 for whole copies on every worker, 1 to 3 for DeepSpeed's ZeRO.

    bytes_per_weight: of the weights that compute: 4 for float32, 2 for half precision.
    tokens: of one packed row, at most; longest: of a prompt with one response, data.max_tokens.
    on_gpu: there the driver takes its share, and grouped keys are repeated for every head under a mask.
    checkpoint_every, offload_checkpoints: with gradient_checkpointing, of so many layers one, and in host memory.
    momentum: of RMSprop. state_bits: of each number in AdamW's moments.
    reduce_bucket, prefetch_bucket, live_parameters, sub_group: DeepSpeed's bounds on what is exchanged, gathered and
        updated at once, in elements. reduce_bucket None: what the engine asks for.
    reuse_distance: DeepSpeed does not let go of weights that are used again within so many elements.
    """

    tokens: int
    longest: int
    bytes_per_weight: Literal[2, 4]
    zero_stage: Literal[0, 1, 2, 3] | None = None
    workers: int = 1
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 1
    offload_checkpoints: bool = False
    lora: LoraLayout | None = None
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    momentum: bool = False
    state_bits: Literal[8, 32] = 32
    on_gpu: bool = True
    sampling: SamplingLayout | None = None
    reduce_bucket: int | None = None
    prefetch_bucket: int = 50_000_000
    live_parameters: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    reuse_distance: int = 1_000_000_000

    @property
    def half(self) -> bool:
        return self.bytes_per_weight == 2

    def checkpointed(self, layers: int) -> int:
        """How many of so many layers are computed again in the backward pass: never the last."""
        return -(-(layers - 1) // self.checkpoint_every) if self.gradient_checkpointing else 0

    def share(self, stage: int) -> int:
        """Among how many workers something is divided that ZeRO divides from this stage on."""
        return self.workers if (self.zero_stage or 0) >= stage else 1

    def bucket_elements(self, trained: int) -> int:
        """trained: parameters in training; the engine asks for no larger bucket than those fill."""
        return min(trained, REDUCE_BUCKET) if self.reduce_bucket is None else self.reduce_bucket


@dataclass(frozen=True)
class Row:
    """What a packed row asks of attention. tokens: of the row; scored: those with a log-prob.

    causal_keys, masked_keys: keys gathered for queries that need no mask, and for those that do; a prompt's keys are
    gathered once for each of its responses, and on a CPU for each block of queries. masked_scores: queries x keys under
    a mask. scored_keys, scored_scores: those of the last layer, where a CPU attends to scored tokens alone, by a mask
    of their own; else 0.
    """

    tokens: int
    scored: int
    causal_keys: int
    masked_keys: int
    masked_scores: int
    scored_keys: int = 0
    scored_scores: int = 0

    @classmethod
    def of_pairs(cls, tokens: int, longest: int, *, on_gpu: bool) -> Row:
        """The row that is planned for: full, of pairs as long as they may be, half of prompt + response being prompt.

        Every token is counted as scored: pairs with short prompts come close to that.
        """
        tokens = max(tokens, longest_pair(longest))
        pairs = tokens / longest_pair(longest)
        # The chosen response continues its prompt causally, the rejected one looks back at it under a mask.
        prompt = longest // 2
        second = _queries_and_keys(longest - prompt, prompt, on_gpu)
        first, *others = _queries_and_keys(longest, 0, on_gpu) + second
        # Of the first response the last layer sees what it sees of the second, or the whole sequence.
        last = [] if on_gpu else 2 * second if is_cut(longest) else [(0, longest), *second]
        whole, scored = (
            (sum(keys for _, keys in calls), sum(queries * keys for queries, keys in calls)) for calls in (others, last)
        )
        counts = (round(pairs * count) for count in (first[1], *whole, *scored))
        return cls(tokens, tokens, *counts)


def _queries_and_keys(queries: int, prefix: int, on_gpu: bool) -> list[tuple[int, int]]:
    """Of every call that a segment takes."""
    blocks = [(0, queries)] if on_gpu else cut_queries(queries)
    return [(end - first, prefix + end) for first, end in blocks]


def longest_pair(longest: int) -> int:
    """Tokens of a pair whose prompt and responses are each half of what prompt + response may have."""
    return -(-3 * longest // 2)
