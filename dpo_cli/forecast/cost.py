"""Disk and time of a run, from the same sizes as its memory."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.forecast.layout import Layout
from dpo_cli.forecast.memory import state_bytes, trained_parameters
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
class Work:
    """Of one optimiser step over all workers. tokens: that go through the model; flops: with the backward pass."""

    tokens: int
    flops: float

    def seconds(self, *, device_tflops: float, workers: int) -> float:
        """device_tflops: a device's stated peak in 1e12 operations a second."""
        return self.flops / (device_tflops * 1e12 * ASSUMED_UTILISATION * workers)


def forecast_step(shape: ModelShape, layout: Layout, *, global_pairs: int) -> Work:
    """A step of pairs as long as they may be, half of each prompt, which is computed once.

    A multiplication with N weights takes 2 N operations forwards and 4 N backwards; frozen weights need no gradient of
    their own, which leaves 2 N of these; checkpointing repeats the forward pass.
    """
    half = layout.longest // 2
    tokens = global_pairs * 3 * half
    # Query-key pairs of one preference pair: a causal triangle of the first half-prompt-half-response, then a response
    # that sees the prompt and its own triangle.
    looked_at = global_pairs * ((2 * half) ** 2 / 2 + half * half + half**2 / 2)
    forward = 2 * shape.active_parameters * tokens + 4 * shape.layers * shape.query_width * looked_at
    passes = (3 if layout.lora is None else 2) + (1 if layout.gradient_checkpointing else 0)
    return Work(tokens, passes * forward)
