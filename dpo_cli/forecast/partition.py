"""What ZeRO holds and moves beside weights, masters and states, in bytes: as DeepSpeed 0.19.8 does it.

trained: parameters in training. "Rounded" gradients are those of half-precision weights, which DeepSpeed keeps apart
from their float32 sum; float32 weights, and adapters, have gradients that are summed as they are. What was read in its
source and measured is told in docs/memory.md.
"""

from __future__ import annotations

from dpo_cli.forecast.layout import Layout
from dpo_cli.forecast.shape import ModelShape

# Whole copies: gradients are exchanged in buckets of this size, or of one tensor that is larger.
ALL_REDUCE_BYTES = 64 * 2**20
# Stage 1 in bfloat16 has no buckets: up to so many gradients are exchanged in one copy, more of them in place.
_ALL_REDUCE_AT_ONCE = 500_000_000


def is_rounded(layout: Layout) -> bool:
    return layout.half and layout.lora is None


def owned(shape: ModelShape, layout: Layout, trained: int) -> int:
    """Elements of the parameters that the largest share of one worker touches, each of them counted whole.

    Shares are cut from all parameters in a row, embeddings first and an output head of its own last.
    """
    share = trained / layout.workers
    if layout.lora is not None:
        return -(-trained // layout.workers)
    first = shape.embedding_parameters
    last = trained if shape.tied else trained - first
    most = 0.0
    for worker in range(layout.workers):
        start, stop = worker * share, (worker + 1) * share
        middle = max(0.0, min(stop, last) - max(start, first))
        most = max(most, middle + first * (start < first) + first * (stop > last))
    return round(most)


def gradients(shape: ModelShape, layout: Layout, trained: int) -> int:
    """The sum of the micro-batches' gradients, where it lies on the device."""
    stage, share = layout.zero_stage or 0, trained // layout.share(2)
    on_host = layout.offload_optimizer != "none"
    if stage == 3 and on_host:
        return 0
    if stage == 2 and not is_rounded(layout):
        # A parameter that lies across two shares is summed whole by both workers.
        return 0 if on_host else 4 * owned(shape, layout, trained)
    return 4 * share


def gradients_on_host(shape: ModelShape, layout: Layout, trained: int) -> int:
    """Of one worker whose optimiser is there: the gradient that it reads, and what stands beside that."""
    mine = trained // layout.workers
    if layout.zero_stage == 3:
        return 4 * mine + 4 * mine
    # The rounded weights on their way back, a gradient on its way here, and float32 gradients' sum.
    ways = layout.bytes_per_weight * mine + offload_buffer(shape, layout)
    return 4 * mine + ways + (0 if is_rounded(layout) else 4 * owned(shape, layout, trained))


def offload_buffer(shape: ModelShape, layout: Layout) -> int:
    """On device and host alike: the largest gradient on its way from one to the other, under stages 1 and 2."""
    if layout.offload_optimizer == "none" or layout.zero_stage not in (1, 2) or layout.lora is not None:
        return 0
    return layout.bytes_per_weight * shape.embedding_parameters


def gathered(shape: ModelShape, layout: Layout) -> int:
    """Weights that are whole during forward and backward passes. One worker's partition is whole already."""
    if layout.zero_stage != 3 or (layout.workers == 1 and not (layout.offload_parameters != "none" and layout.on_gpu)):
        return 0
    largest = max(shape.layer_parameters, shape.embedding_parameters)
    live = max(layout.live_parameters, largest + layout.prefetch_bucket)
    return layout.bytes_per_weight * min(shape.parameters, live)


def prefetched(shape: ModelShape, layout: Layout) -> int:
    """Weights as they were received together: kept beside the gathered ones until the last of them is used."""
    if layout.zero_stage != 3 or layout.workers == 1:
        return 0
    # The bucket is closed by the parameter that overfills it.
    last = max(linear.parameters for linear in shape.linears) if shape.tied else shape.embedding_parameters
    return layout.bytes_per_weight * min(shape.parameters, layout.prefetch_bucket + last)


def bucket(layout: Layout, trained: int) -> int:
    """Where gradients are collected: during the backward pass under stage 2, always under stage 3."""
    elements = layout.bucket_elements(trained)
    if not layout.on_gpu:
        # What is never written to is not in memory.
        elements = min(elements, trained)
    # Stage 3 widens as it collects.
    width = 2 if is_rounded(layout) and layout.zero_stage == 2 else 4
    return width * elements if layout.zero_stage in (2, 3) else 0


def exchange(shape: ModelShape, layout: Layout, trained: int) -> int:
    """What reducing a bucket, or one larger matrix, takes beside it."""
    stage, elements = layout.zero_stage, min(layout.bucket_elements(trained), trained)
    largest = 0 if layout.lora is not None else shape.embedding_parameters
    elements = max(elements, largest)
    if stage is None or (stage == 0 and layout.workers == 1):
        return 0
    if stage == 0:
        return min(max(ALL_REDUCE_BYTES, 4 * largest), 4 * trained)
    if stage == 1 and is_rounded(layout):
        return 4 * trained if trained <= _ALL_REDUCE_AT_ONCE else 0
    if stage == 1:
        # Gradients move into the bucket as it fills; then it is copied, or those of this worker out of it.
        return 4 * max(elements, owned(shape, layout, trained))
    if stage == 2 and is_rounded(layout):
        # A flat copy of the bucket, and that in float32.
        return (2 + 4) * elements
    if stage == 2:
        copied = 4 * elements if layout.workers > 1 else 0
        mine = 4 * owned(shape, layout, trained)
        return copied + mine if has_several_buckets(layout, trained) else max(copied, mine)
    # Sorted by worker in a copy; gloo takes one more.
    return 4 * elements * (1 if layout.on_gpu else 2)


def has_several_buckets(layout: Layout, trained: int) -> bool:
    """Whether gradients are exchanged already while the backward pass goes on."""
    return layout.zero_stage in (2, 3) and trained > layout.bucket_elements(trained)


def step(shape: ModelShape, layout: Layout, trained: int) -> int:
    """What the optimiser's step takes beside the gradients that were summed."""
    mine, stage = trained // layout.share(1), layout.zero_stage or 0
    if layout.offload_optimizer != "none":
        return 0
    # RMSprop takes the root of all squared gradients at once; AdamW is fused.
    roots = 4 if layout.optimizer == "rmsprop" else 0
    if stage == 0 or (stage == 1 and is_rounded(layout)):
        return roots * mine
    # The norm of one tensor at a time, in float64.
    norm = 0 if layout.lora is not None else 8 * shape.embedding_parameters // layout.share(3)
    if stage == 3:
        # A flat copy of the gradients that are used at once.
        used = min(mine, layout.sub_group)
        return max(min(norm, 8 * mine), (4 + roots) * used)
    if is_rounded(layout):
        return max(min(norm, 8 * mine), roots * mine)
    summed = gradients(shape, layout, trained)
    flat = 4 * owned(shape, layout, trained) + 4 * mine
    return max(0, min(norm, 8 * mine), flat - summed, (4 + roots) * mine - summed)
