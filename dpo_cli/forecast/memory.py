"""Memory of a training step, device and host: what stays, and what the moment of its peak adds.

What autograd keeps was read off the layers themselves (a norm in float32, the inputs of every matrix product, both
sides of every product that is trained) and compared with measurements: docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.batch.blocks import is_cut
from dpo_cli.forecast import partition
from dpo_cli.forecast.layout import Layout, Row, SamplingLayout
from dpo_cli.forecast.shape import ModelShape

GIB = 2**30
# Of float32 logits in one chunk of the output head.
CHUNK_BYTES = 64 * 2**20
CHUNK_TOKENS = 512
_CHUNK_ROWS_AT_LEAST = 16
# Kernels, cuBLAS workspace and the driver's own share of a GPU; NCCL's channels where there are several workers.
_CUDA_CONTEXT = round(0.6 * GIB)
_NCCL = round(0.5 * GIB)

PARAMETERS, MASTERS, GRADIENTS, OPTIMIZER = "parameters", "float32 masters", "gradients", "optimiser states"
ACTIVATIONS, ATTENTION, HEAD = "activations", "attention buffers", "output head, by chunks"
FLIGHT, BUCKETS, CONTEXT = "work in flight", "communication", "CUDA context"
REFERENCE, CACHE = "frozen reference", "key-value cache"
LINES = (
    PARAMETERS, REFERENCE, MASTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, ATTENTION, HEAD, CACHE, FLIGHT, BUCKETS, CONTEXT,
)  # fmt: skip
# The sampler's buffers have room for some more tokens than they hold.
_CACHE_ROOM = 1.25


@dataclass(frozen=True)
class Moment:
    """One moment of a step and the bytes it needs beside what always stays, by name of `LINES`."""

    name: str
    lines: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.lines.values())


@dataclass(frozen=True)
class Memory:
    """Bytes on each device: what stays, by name of `LINES`, and the moments of a step.

    host: of all workers of one machine together, if they are all there; nvme: on the fast disk.
    """

    stays: dict[str, int]
    moments: tuple[Moment, ...]
    host: int
    nvme: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def total(self) -> int:
        return sum(self.stays.values()) + self.peak.bytes

    def at_peak(self, line: str) -> int:
        return self.stays.get(line, 0) + self.peak.lines.get(line, 0)

    def at_most(self, line: str) -> int:
        """The most a line ever takes, which may be at another moment than the peak of all."""
        return self.stays.get(line, 0) + max(moment.lines.get(line, 0) for moment in self.moments)


def trained_parameters(shape: ModelShape, layout: Layout) -> int:
    if layout.lora is None:
        return shape.parameters
    adapted = shape.lora_linears(layout.lora.targets)
    each = sum(linear.copies * (linear.inputs + linear.outputs) for linear in adapted)
    return shape.layers * layout.lora.rank * each


def state_bytes(layout: Layout) -> int:
    """Of the optimiser, for each parameter in training."""
    states = 2 if layout.optimizer == "adamw" or layout.momentum else 1
    return states * layout.state_bits // 8


def forecast_memory(shape: ModelShape, layout: Layout, row: Row | None = None) -> Memory:
    """row: what goes through the model at once; by default a full one of pairs as long as they may be."""
    row = row or Row.of_pairs(layout.tokens, layout.longest, on_gpu=layout.on_gpu)
    stays, host, nvme = _what_stays(shape, layout)
    if layout.offload_checkpoints and layout.on_gpu:
        host += _checkpoints(shape, layout, row) * layout.workers
    moments = _moments(shape, layout, row)
    if layout.sampling is not None:
        moments += (_sampling_moment(shape, layout, layout.sampling, stays),)
    return Memory(stays, moments, host, nvme)


def _what_stays(shape: ModelShape, layout: Layout) -> tuple[dict[str, int], int, int]:
    trained = trained_parameters(shape, layout)
    masters = 4 * trained if _has_masters(layout) else 0
    stays = {
        PARAMETERS: _frozen_and_trained(shape, layout) // layout.share(3),
        MASTERS: masters // layout.share(1),
        GRADIENTS: partition.gradients(shape, layout, trained),
        OPTIMIZER: state_bytes(layout) * trained // layout.share(1),
        BUCKETS: partition.offload_buffer(shape, layout)
        + (partition.bucket(layout, trained) if layout.zero_stage == 3 else 0),
        CONTEXT: (_CUDA_CONTEXT + (_NCCL if layout.workers > 1 else 0)) if layout.on_gpu else 0,
    }
    if layout.sampling is not None and layout.sampling.frozen_reference:
        stays[REFERENCE] = layout.bytes_per_weight * shape.parameters // layout.share(3)
    elsewhere = {"cpu": 0, "nvme": 0}
    if layout.offload_optimizer != "none":
        # What is moved there is moved with a float32 copy of the weights, whatever their own dtype.
        stays[MASTERS] = 0
        moved = 4 * trained // layout.share(1) + stays.pop(OPTIMIZER)
        elsewhere[layout.offload_optimizer] += moved * layout.workers
        elsewhere["cpu"] += partition.gradients_on_host(shape, layout, trained) * layout.workers
    if layout.offload_parameters != "none" and layout.zero_stage == 3:
        for line in (PARAMETERS, REFERENCE):
            elsewhere[layout.offload_parameters] += stays.get(line, 0) * layout.workers
            stays[line] = 0
    return stays, elsewhere["cpu"], elsewhere["nvme"]


def _has_masters(layout: Layout) -> bool:
    """Float32 weights, adapters among them, are their own masters; ZeRO keeps a flat copy all the same."""
    return bool(layout.zero_stage) or (layout.half and layout.lora is None)


def _frozen_and_trained(shape: ModelShape, layout: Layout) -> int:
    adapters = 4 * trained_parameters(shape, layout) if layout.lora else 0
    return layout.bytes_per_weight * shape.parameters + adapters


def _moments(shape: ModelShape, layout: Layout, row: Row) -> tuple[Moment, ...]:
    trained, width = trained_parameters(shape, layout), layout.bytes_per_weight
    whole = layout.lora is None
    layer, attention = _layer_activations(shape, layout, row)
    outer = _outer_activations(shape, layout, row)
    whole_layers = shape.layers - layout.checkpointed(shape.layers)
    checkpoints = 0 if layout.offload_checkpoints and layout.on_gpu else _checkpoints(shape, layout, row)
    spared = _spared(shape, layout, row)
    kept = {ACTIVATIONS: whole_layers * layer - spared + checkpoints + outer, ATTENTION: whole_layers * attention}
    whole_weights = {PARAMETERS: partition.gathered(shape, layout)}
    kept |= whole_weights
    chunk, head_gradient, embedding = _head(shape, layout, row), 0, shape.embedding_parameters
    if whole:
        # A running sum in float32, and in half precision one chunk's share or the rounded result beside it. A CPU
        # widens that share before it is added.
        head_gradient = 4 * embedding
        head_gradient += (width + (0 if layout.on_gpu else 4)) * embedding if layout.half else 0
    hidden_gradient = width * row.scored * shape.hidden

    first = dict(kept)
    if layout.gradient_checkpointing:
        # A layer that is computed again takes the place of the last one, and spares nothing.
        first[ACTIVATIONS] += spared
    working = width * row.tokens * (2 * shape.mlp_width + 2 * shape.hidden)
    # The head's gradient waits for the embedding's where they are one matrix; in half precision it stays in any case.
    waiting = width * embedding if whole and (shape.tied or (layout.half and not layout.zero_stage)) else 0

    # Half-precision gradients are complete before they are added to the float32 ones; ZeRO adds each as it comes.
    rounded = width * trained if layout.half and whole and not layout.zero_stage else 0
    last = max(
        width * embedding * (2 if shape.tied else 1) if whole else 0,
        4 * embedding if layout.half and whole and not layout.zero_stage else 0,
        # Stage 1 widens it to add it.
        (width + 4) * embedding if layout.half and whole and layout.zero_stage == 1 else 0,
    )

    stage2 = layout.zero_stage == 2
    collecting = partition.bucket(layout, trained) if stage2 else 0
    # On a GPU a bucket is there as soon as it is made, on a CPU as far as it is filled: by the head alone at first.
    begun = collecting if layout.on_gpu else 0
    half_way = collecting if layout.on_gpu else min(collecting, width * embedding if whole and not shape.tied else 0)
    nearly = collecting if layout.on_gpu else max(0, collecting - (width * embedding if whole else 0))
    exchange = partition.exchange(shape, layout, trained)
    meanwhile = exchange if partition.has_several_buckets(layout, trained) else 0
    # Weights are let go and gathered again during the backward pass only where they are not all kept.
    prefetched = partition.prefetched(shape, layout)
    again = prefetched if shape.parameters > layout.live_parameters else 0
    # Stages 2 and 3 reduce what each backward pass has found, the others what all have, just before the step.
    reducing = whole_weights if layout.zero_stage == 3 else {}
    return (
        Moment("the forward pass of the output head", {**kept, HEAD: chunk[0]}),
        Moment(
            "the backward pass of the output head",
            {**kept, HEAD: chunk[1], FLIGHT: head_gradient + hidden_gradient, BUCKETS: begun},
        ),
        Moment(
            "the backward pass of the last layer",
            {**first, FLIGHT: waiting + working, BUCKETS: half_way + meanwhile + again},
        ),
        Moment("the end of the backward pass", {**whole_weights, FLIGHT: rounded + last, BUCKETS: nearly}),
        Moment("the forward pass of the last layer", {**kept, BUCKETS: prefetched}),
        Moment("the reduction of gradients", {**reducing, BUCKETS: collecting + exchange}),
        Moment("the optimiser's step", {FLIGHT: partition.step(shape, layout, trained)}),
    )


def _checkpoints(shape: ModelShape, layout: Layout, row: Row) -> int:
    """The inputs of the layers that are computed again."""
    return layout.checkpointed(shape.layers) * layout.bytes_per_weight * shape.hidden * row.tokens


def _sampling_moment(shape: ModelShape, layout: Layout, sampling: SamplingLayout, stays: dict[str, int]) -> Moment:
    """While the policy writes: its cache, a token's probabilities, and all weights where they are else partitioned."""
    width, rows = layout.bytes_per_weight, max(1, sampling.tokens // sampling.longest)
    cache = 2 * width * shape.layers * shape.key_width * sampling.tokens
    # Prompts are read in one go; half of the tokens are taken to be theirs.
    reading = width * (sampling.tokens // 2) * (2 * shape.mlp_width + 2 * shape.hidden)
    # Logits, the same in float32, probabilities, and their sums in float64.
    choosing = rows * shape.vocabulary * (width + 4 + 4 + 8)
    lines = {CACHE: round(_CACHE_ROOM * cache), FLIGHT: max(reading, choosing)}
    if layout.zero_stage == 3:
        lines[PARAMETERS] = width * shape.parameters - stays[PARAMETERS]
    if not layout.zero_stage:
        # There are none before the step's first backward pass.
        lines[GRADIENTS] = -stays[GRADIENTS]
    return Moment("the sampling of responses", lines)


def _layer_activations(shape: ModelShape, layout: Layout, row: Row) -> tuple[int, int]:
    """What one layer keeps for its backward pass: without attention's own, and that."""
    width, whole = layout.bytes_per_weight, layout.lora is None
    # Of the residual stream's norms the products keep the scaled result, too.
    norms = (_norm(layout) + (width if whole else 0)) * 2 * shape.hidden + _norm(layout) * shape.norm_width
    projected = shape.query_width * width if whole else 0
    # Tokens are gathered for their experts, and what comes back is weighted.
    experts = 3 * width * shape.hidden * shape.experts_per_token
    adapters = 0
    if layout.lora is not None:
        for linear in shape.lora_linears(layout.lora.targets):
            # Every adapter reads its input in float32: a copy of its own in half precision, the shared one else.
            share = 4 * linear.inputs if layout.half or linear.inputs != shape.hidden else 2 * linear.inputs
            adapters += linear.used * (share + 4 * layout.lora.rank)
    tokens = row.tokens * (norms + _inner_activations(shape, layout) + projected + experts + adapters)
    gathered = row.tokens * (2 * width * shape.query_width + 4 * shape.heads)
    masked_width = shape.query_width if layout.on_gpu else shape.key_width
    keys = 2 * width * (row.causal_keys * shape.key_width + row.masked_keys * masked_width)
    return tokens, gathered + keys


def _norm(layout: Layout) -> int:
    """A norm keeps its input in float32, and for a weight in training its rounded result, not scaled yet.

    Our own (dpo_cli/policy/norms.py) computes the latter again.
    """
    own = not (layout.half or layout.on_gpu or layout.zero_stage == 3)
    return 4 + (0 if own or layout.lora is not None else layout.bytes_per_weight)


def _inner_activations(shape: ModelShape, layout: Layout) -> int:
    """What a feed-forward network keeps of a token: the last product's input only where its weight is in training.

    Of a gate, what SiLU makes of it is computed again (dpo_cli/policy/gated.py).
    """
    between = (2 if shape.gate_is_silu else 3) if shape.gated else 1
    return shape.mlp_width * (between + (layout.lora is None)) * layout.bytes_per_weight


def _spared(shape: ModelShape, layout: Layout, row: Row) -> int:
    """What the last layer does not keep: of rows that predict no response token. Those that do are copied together."""
    width, whole = layout.bytes_per_weight, layout.lora is None
    queries = width * shape.query_width
    attended = 2 * queries + 4 * shape.heads if not layout.on_gpu and is_cut(layout.longest) else 0
    inputs, copied = (width * shape.hidden + queries, width * shape.hidden) if whole else (0, 0)
    unscored = row.tokens - row.scored
    return unscored * (_inner_activations(shape, layout) + inputs + attended) - row.scored * copied


def _outer_activations(shape: ModelShape, layout: Layout, row: Row) -> int:
    """Kept once: the last norm, the hidden states that are scored, rotations, masks, ids."""
    width = layout.bytes_per_weight
    head_dim = shape.query_width // shape.heads
    tokens = row.tokens * (_norm(layout) * shape.hidden + 2 * width * head_dim + 40)
    indices = 8 * (row.causal_keys + row.masked_keys + row.scored_keys)
    masks = width * (row.masked_scores * (shape.layers > 1 or not row.scored_keys) + row.scored_scores)
    return tokens + indices + row.scored * (width * shape.hidden + 64) + masks


def _head(shape: ModelShape, layout: Layout, row: Row) -> tuple[int, int]:
    """Chunk-sized buffers of the head, forward and backward: logits, and the softmaxes that are kept in between."""
    chunk = min(CHUNK_TOKENS, max(_CHUNK_ROWS_AT_LEAST, CHUNK_BYTES // (4 * shape.vocabulary)))
    logits = 4 * min(row.scored, chunk) * shape.vocabulary
    softmaxes = logits * min(-(-row.scored // chunk), max(1, CHUNK_BYTES // (4 * chunk * shape.vocabulary)))
    # In half precision the product comes rounded before it is widened, and goes back rounded.
    rounded = logits // 2 if layout.half else 0
    return logits + softmaxes + rounded, softmaxes + rounded
