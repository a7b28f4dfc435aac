"""What the workers exchange in a step, in bytes: as this tool's engine and DeepSpeed 0.19.8 do it.

Bytes are those of the whole tensors that are put together or summed, as each worker passes them to a collective. In a
ring a worker sends and receives (w - 1) / w of them; a sum that everybody gets (an all-reduce) is a reduction and a
gathering. `scripts/bench/traffic.py` counts the same in training.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.forecast.layout import Layout
from dpo_cli.forecast.memory import trained_parameters
from dpo_cli.forecast.shape import ModelShape

# Bytes of a gradient on its way, whatever computes, and of an adapter's weight under stage 3.
_SUM = 4


@dataclass(frozen=True)
class Traffic:
    """Of one step, in bytes of whole tensors. A handful of numbers (losses, norms) travels beside them."""

    gathered: int
    reduced: int

    def sent(self, workers: int) -> float:
        """Bytes that each worker sends, and receives."""
        return (self.gathered + self.reduced) * (workers - 1) / workers


def forecast_traffic(shape: ModelShape, layout: Layout, *, micro_batches: int) -> Traffic:
    """micro_batches: forward and backward passes of each worker before the optimiser's step.

    Whole copies and stage 1 sum gradients once a step, stages 2 and 3 in each backward pass. The new weights are
    gathered after the step, under stage 3 when they are used.
    """
    if layout.workers == 1:
        return Traffic(0, 0)
    trained, width = trained_parameters(shape, layout), layout.bytes_per_weight
    match layout.zero_stage:
        case 3:
            gathered = micro_batches * _gathered_in_a_pass(shape, layout, trained)
            return Traffic(gathered, micro_batches * _SUM * trained)
        case 2:
            # DeepSpeed sums a bucket for everybody, and each worker keeps its share.
            summed = micro_batches * _SUM * trained
            return Traffic(summed + width * trained, summed)
        case 1:
            return Traffic((_SUM + width) * trained, _SUM * trained)
        case _:
            return Traffic(_SUM * trained, _SUM * trained)


def forward_traffic(shape: ModelShape, layout: Layout) -> Traffic:
    """Of one forward pass without a backward one, as the reference makes it."""
    partitioned = layout.zero_stage == 3 and layout.workers > 1
    return Traffic(layout.bytes_per_weight * shape.parameters if partitioned else 0, 0)


def _gathered_in_a_pass(shape: ModelShape, layout: Layout, trained: int) -> int:
    """Bytes that stage 3 gathers for a forward and a backward pass: all weights, and again what was let go between.

    DeepSpeed keeps a weight where fewer than `reuse_distance` elements are used before it is used again. So the model's
    end stays until the backward pass comes back to it (each element before it is used twice until then, three times
    with checkpointing). A layer that checkpointing computes again is gathered for that, and what lies too far from its
    own backward pass once more; of frozen weights nearly all. An upper bound, exact where nothing or all is kept.
    """
    frozen = layout.lora is not None
    weights = shape.parameters + (trained if frozen else 0)
    again = max(0, weights - layout.reuse_distance // (3 if layout.gradient_checkpointing else 2))
    once_more = 0
    if layout.gradient_checkpointing:
        let_go = max(0, shape.layer_parameters - layout.reuse_distance // 2)
        # The last layer is not computed again.
        once_more = shape.layers * (shape.layer_parameters if frozen else let_go) - let_go
    passed = shape.parameters * (weights + again) // weights + once_more
    adapters = _SUM * trained * (weights + again) // weights if frozen else 0
    return layout.bytes_per_weight * passed + adapters
