"""Which models the packed layout is right for; all others are refused before their weights are read.

In a packed row several sequences share one forward pass, kept apart by the attention function alone. Whatever else
mixes tokens (a recurrence, a convolution), changes with the longest sequence at hand (some RoPE scalings), or shapes
the attention in a way that function does not know (sinks, soft-capping) would give log-probs that are wrong and look
fine. The self-test at start is the second line of defence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dpo_cli.errors import ModelError

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_OTHER_MODEL = (
    "choose a decoder-only text model with plain or sliding-window attention: Qwen, Llama, Mistral, Gemma 3, ..."
)

# Config fields that switch on something the packed attention does not do. The value is what it is called.
_REFUSED_FIELDS: Mapping[str, str] = {
    "attn_logit_softcapping": "soft-capped attention scores",
    "attention_chunk_size": "chunked attention",
    "index_topk": "attention over keys chosen by an indexer",
    "use_bidirectional_attention": "attention that is not causal",
    "alibi": "ALiBi position biases, which depend on the place in the row",
    "sliding_window_sink_size": "attention sinks",
}


def check_config(config: Any, *, where: str, max_tokens: int | None = None) -> None:
    """Raise ModelError when a model of this config cannot be scored in packed rows.

    config: a transformers configuration, read before any weights.
    max_tokens: the longest prompt + response of the data, where known; some RoPE scalings change beyond a length.
    """

    def refuse(why: str, hint: str = _OTHER_MODEL) -> ModelError:
        return ModelError(f"{_name(config)} cannot be scored in packed rows: it has {why}.", where=where, hint=hint)

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("an encoder beside its decoder")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{_name(config)} is quantised; its weights cannot be trained or scored here.",
            where=where,
            hint="use the unquantised model",
        )
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config", "speech_config")):
        raise ModelError(
            f"{_name(config)} is more than a text model, and only text is trained here.",
            where=where,
            hint="use the text-only model of the same family (such as google/gemma-3-1b-it)",
        )
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES)
    if other_layers:
        raise refuse(f"layers of type {', '.join(other_layers)}")
    for field, what in _REFUSED_FIELDS.items():
        if getattr(config, field, None):
            raise refuse(f"{what} ({field}={getattr(config, field)})")
    _check_rope(config, max_tokens, refuse)


def _check_rope(config: Any, max_tokens: int | None, refuse: Callable[..., ModelError]) -> None:
    """Scalings that look at the longest sequence of the ROW would let one example change another's numbers."""
    for rope in rope_parameters(config):
        kind = rope.get("rope_type", "default")
        if "dynamic" in kind:
            raise refuse(f"{kind} RoPE scaling, which changes with the longest sequence at hand")
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if max_tokens is None or max_tokens > limit:
                raise refuse(
                    f"longrope scaling, which changes once any sequence in the row exceeds {limit} tokens",
                    hint=f"data.max_tokens={limit}",
                )


def rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """One mapping per kind of layer: newer configs nest them by layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def sliding_window(config: Any) -> int | None:
    """The window in use, if any: Qwen2 configs carry one that is switched off.

    Models whose configs know no types of layers, such as Mistral's, use a window in all, whatever a folder says there.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = config.layer_types if hasattr(type(config), "layer_types") else None
    if not window or (layer_types is not None and "sliding_attention" not in layer_types):
        return None
    return int(window)


def check_model_class(model_class: type, *, where: str) -> None:
    """Raise ModelError when this class of model does not let its attention be replaced, or carries a running state."""

    def refuse(why: str) -> ModelError:
        return ModelError(
            f"{model_class.__name__} cannot be scored in packed rows: it {why}.", where=where, hint=_OTHER_MODEL
        )

    if getattr(model_class, "_is_stateful", False):
        raise refuse("carries a recurrent state from token to token")
    can_replace: Callable[[], bool] | None = getattr(model_class, "_can_set_attn_implementation", None)
    if not getattr(model_class, "_supports_attention_backend", False) or (can_replace and not can_replace()):
        raise refuse("does not take its attention from transformers' attention interface")


def check_modules(model: nn.Module, *, where: str) -> None:
    """Raise ModelError for modules that mix neighbouring tokens or add to the attention, whatever the config says."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.RNNBase):
            what = f"a {type(module).__name__} at {name}, which mixes neighbouring tokens"
        elif isinstance(getattr(module, "sinks", None), nn.Parameter):
            what = f"attention sinks at {name}"
        else:
            continue
        raise ModelError(
            f"{type(model).__name__} cannot be scored in packed rows: it has {what}.", where=where, hint=_OTHER_MODEL
        )


def _name(config: Any) -> str:
    architectures = getattr(config, "architectures", None)
    return architectures[0] if architectures else f"A model of type {getattr(config, 'model_type', 'unknown')}"
