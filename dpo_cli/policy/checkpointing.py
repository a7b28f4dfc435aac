"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_cli.errors import ModelError
from dpo_cli.policy.scored_rows import last_layer


def enable_checkpointing(model: PreTrainedModel, *, every: int = 1, offload: bool = False) -> None:
    """Compute one of `every` layers again in the backward pass; offload: keep their inputs in pinned host memory.

    Never the last: the backward pass begins with it, so that it would be computed again at once, for little saved.

    Raises ModelError for a model, or a version of transformers, that cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} has no gradient checkpointing.",
            where="model.gradient_checkpointing",
            hint="model.gradient_checkpointing=false",
        )
    how: dict[str, Any] = {"every_n_layers": every} if every > 1 else {}
    how |= {"offload": True} if offload else {}
    try:
        model.activation_checkpointing_enable({"use_reentrant": False}, **how)
    except TypeError as error:
        raise ModelError(
            f"{type(model).__name__} cannot checkpoint in that way with this version of transformers: {error}",
            where="model.checkpoint_every, model.offload_checkpoints",
            hint="leave them out, or pip install -U transformers",
        ) from error
    last = last_layer(model.get_decoder())
    if isinstance(last, GradientCheckpointingLayer):
        last.gradient_checkpointing = False
