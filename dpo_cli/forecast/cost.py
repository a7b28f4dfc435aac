"""Disk and time of a run, from the same sizes as its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dpo_cli.forecast.layout import Layout
from dpo_cli.forecast.memory import CHUNK_BYTES, state_bytes, trained_parameters
from dpo_cli.forecast.shape import ModelShape

# Of the peak that the vendor states: what training reaches where nothing holds it up.
ASSUMED_UTILISATION = 0.4


@dataclass(frozen=True)
class Disk:
    """Bytes. checkpoint: each; most: while one more is written than are kept; final: the exported model."""

    checkpoint: int
    most: int
    final: int


def forecast_disk(shape: ModelShape, layout: Layout, *, keep_checkpoints: int) -> Disk:
    """A checkpoint holds float32 weights in training and the optimiser's states, whatever the layout."""
    trained = trained_parameters(shape, layout)
    checkpoint = (4 + state_bytes(layout)) * trained
    # With adapters they lie beside the merged model.
    final = layout.bytes_per_weight * shape.parameters + (4 * trained if layout.lora else 0)
    return Disk(checkpoint, checkpoint * (keep_checkpoints + 1), final)


@dataclass(frozen=True)
class Batch:
    """What a step asks of the model. pairs: how many; tokens: that go through it, every prompt's once.

    scored: tokens of responses; looked_at: query-key pairs of attention, of which so many in prompts.
    """

    pairs: int
    tokens: int
    scored: int
    looked_at: float
    looked_at_in_prompts: float

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, ...]]) -> Batch:
        """lengths: of each pair in tokens, (prompt, response, response, ...)."""
        pairs = tokens = scored = 0
        looked_at = in_prompts = 0.0
        for prompt, first, *others in lengths:
            pairs, tokens, scored = pairs + 1, tokens + prompt + first + sum(others), scored + first + sum(others)
            # A causal triangle of the prompt and the first response, then of each other one, which sees the prompt.
            looked_at += (prompt + first) ** 2 / 2 + sum(other * (prompt + other / 2) for other in others)
            in_prompts += prompt**2 / 2
        return cls(pairs, tokens, scored, looked_at, in_prompts)


@dataclass(frozen=True)
class Work:
    """Of one optimiser step. tokens: that go through the model, flops: with the backward pass, of all workers together.

    micro_batches: forward and backward passes of each worker.
    """

    tokens: int
    flops: float
    micro_batches: int = 1

    def seconds(self, *, device_tflops: float, workers: int, utilisation: float = ASSUMED_UTILISATION) -> float:
        """Of computation alone. device_tflops: a device's stated peak in 1e12 operations a second."""
        return self.flops / (device_tflops * 1e12 * utilisation * workers)


def forecast_step(shape: ModelShape, layout: Layout, *, global_pairs: int) -> Work:
    """A step of pairs as long as they may be, half of each prompt, which is computed once."""
    half = max(1, layout.longest // 2)
    return work_of(shape, layout, Batch.of([(half, half, half)] * global_pairs))


def work_of(shape: ModelShape, layout: Layout, batch: Batch) -> Work:
    """A step over a batch whose rows are filled with pairs of its average length.

    A multiplication with N weights takes 2 N operations forwards and 4 N backwards; frozen weights need no gradient of
    their own, which leaves 2 N of these; checkpointing repeats the layers' forward pass, and the head repeats its own.
    """
    together = max(1, layout.tokens * batch.pairs // batch.tokens)
    micro_batches = -(-batch.pairs // (together * layout.workers))
    layers, head = _forward(shape, batch)
    backwards = 2 if layout.lora is None else 1
    # So many positions' softmaxes are kept in each micro-batch instead of being computed again.
    kept = min(batch.scored, micro_batches * layout.workers * CHUNK_BYTES // (4 * shape.vocabulary))
    again = 1 - kept / batch.scored
    # The last layer, which computes less than the others, is not repeated.
    layer = (layers + _spared(shape, batch)) / shape.layers
    repeated = layout.checkpointed(shape.layers) * layer
    flops = (1 + backwards) * layers + repeated + (1 + backwards + again) * head
    return Work(batch.tokens, flops, micro_batches)


def needed_flops(shape: ModelShape, batch: Batch, *, adapters: bool) -> float:
    """Operations that training on the batch cannot do without: nothing computed again, frozen weights ungraded."""
    return (2 if adapters else 3) * sum(_forward(shape, batch))


def scoring_work(shape: ModelShape, batch: Batch) -> Work:
    """A forward pass over the batch, as the reference makes it once for every pair."""
    return Work(batch.tokens, sum(_forward(shape, batch)))


def _forward(shape: ModelShape, batch: Batch) -> tuple[float, float]:
    """Operations of the layers, and of the output head, which sees scored positions only."""
    multiplied = (shape.active_parameters - shape.embedding_parameters) * batch.tokens
    attention = 4 * shape.layers * shape.query_width * batch.looked_at
    layers = 2 * multiplied + attention - _spared(shape, batch)
    return layers, 2.0 * shape.embedding_parameters * batch.scored


def _spared(shape: ModelShape, batch: Batch) -> float:
    """Operations of the last layer's forward pass for unscored positions, beside those for their keys and values."""
    projections = 2 * shape.hidden * shape.query_width
    multiplied = (shape.feed_forward + projections) * (batch.tokens - batch.scored)
    return 2 * multiplied + 4 * shape.query_width * batch.looked_at_in_prompts
