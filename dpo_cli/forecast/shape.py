"""The sizes of a model that memory and time follow from, out of its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.errors import ModelError

# Who shares input and output embeddings when config.json does not say: transformers leaves defaults out of the file.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2", "gpt2", "smollm3", "starcoder2")
_HEAD_DIM_BY_DEFAULT = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
# Two matrices with an activation between them; everybody else has a gate as well.
_WITHOUT_GATE = ("gpt2", "gpt_neox", "phi", "starcoder2", "opt")
_WITH_FUSED_GATE = ("phi3", "glm4")
_WITH_QUERY_KEY_BIAS = ("qwen2", "qwen2_moe")
_WITH_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", "exaone4")
_WITH_FULL_NORMS = ("olmo2", "olmo3")
_WITH_FOUR_NORMS = ("gemma2", "gemma3_text", "glm4")
_WITH_ONE_NORM = ("cohere", "cohere2", "phi")
# Norms that subtract the mean, with a bias beside the weight.
_LAYER_NORMS = ("gpt2", "gpt_neox", "phi", "starcoder2")
_ONE_KEY_PER_HEAD = ("gpt2", "gpt_neox")
_LAST_OF_FEED_FORWARD = ("down_proj", "shared_down_proj", "fc2")


@dataclass(frozen=True)
class Linear:
    """A matrix product of every layer. copies: how many of it a layer has; a token goes through `used` of them."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    used: int = 1

    @property
    def parameters(self) -> int:
        return self.copies * (self.inputs * self.outputs + (self.outputs if self.bias else 0))


@dataclass(frozen=True)
class ModelShape:
    """A decoder. Widths are numbers per token and layer, `parameters` counts the whole model.

    query_width, key_width: heads x head_dim, key-value heads x head_dim. mlp_width: the inner width of the feed-forward
    part a token goes through, over all of its experts. gate_is_silu: of a dense network whose gate is a matrix of its
    own. norm_width: what is normalised outside of the residual stream's two norms. active_parameters: those a token is
    multiplied with, the output head included, a look-up not.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    query_width: int
    key_width: int
    mlp_width: int
    gated: bool
    gate_is_silu: bool
    norm_width: int
    vocabulary: int
    tied: bool
    linears: tuple[Linear, ...]
    experts_per_token: int
    layer_parameters: int
    parameters: int
    active_parameters: int

    @property
    def embedding_parameters(self) -> int:
        """Of one of the two embedding matrices, usually the largest tensor of a model."""
        return self.vocabulary * self.hidden

    @property
    def feed_forward(self) -> int:
        """Weights that a token is multiplied with in one layer's feed-forward part."""
        attention = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
        return sum(each.used * each.inputs * each.outputs for each in self.linears if each.name not in attention)

    @classmethod
    def of(cls, config: Mapping[str, Any], *, counted_parameters: int | None = None) -> ModelShape:
        """Read a config.json. counted_parameters: what the weight files hold, which is truer than any formula.

        Raises ModelError when the config does not state the sizes that are needed.
        """
        text = config.get("text_config")
        config = {**config, **text} if isinstance(text, Mapping) else config
        model_type = str(config.get("model_type", ""))
        hidden = _size(config, "hidden_size", "n_embd")
        layers = _size(config, "num_hidden_layers", "n_layer")
        heads = _size(config, "num_attention_heads", "n_head")
        kv_heads = heads if model_type in _ONE_KEY_PER_HEAD else int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or _HEAD_DIM_BY_DEFAULT.get(model_type) or hidden // heads)
        vocabulary = _size(config, "vocab_size")
        tied = bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT))
        query, key = heads * head_dim, kv_heads * head_dim
        gated = model_type not in _WITHOUT_GATE
        linears = (
            *_attention(config, model_type, hidden, query, key),
            *_feed_forward(config, model_type, hidden, gated),
        )
        mlp_width = sum(linear.used * linear.inputs for linear in linears if linear.name in _LAST_OF_FEED_FORWARD)
        head_norms, full_norms = model_type in _WITH_HEAD_NORMS, model_type in _WITH_FULL_NORMS
        norms = 4 if model_type in _WITH_FOUR_NORMS else 1 if model_type in _WITH_ONE_NORM else 2
        norm_parameters = norms * hidden * (2 if model_type in _LAYER_NORMS else 1)
        norm_parameters += 2 * head_dim if head_norms else query + key if full_norms else 0
        # A mixture may keep some layers dense; they are few, and narrower ones count for little.
        layer = norm_parameters + sum(linear.parameters for linear in linears)
        final_norm = hidden * (2 if model_type in _LAYER_NORMS else 1)
        embeddings = vocabulary * hidden
        positions = _size(config, "n_positions") * hidden if model_type == "gpt2" else 0
        head_bias = vocabulary if model_type == "phi" else 0
        total = (1 if tied else 2) * embeddings + positions + head_bias + layers * layer + final_norm
        active = embeddings + layers * sum(linear.used * linear.inputs * linear.outputs for linear in linears)
        return cls(
            model_type=model_type,
            hidden=hidden,
            layers=layers,
            heads=heads,
            query_width=query,
            key_width=key,
            mlp_width=mlp_width,
            gated=gated,
            gate_is_silu=any(linear.name == "gate_proj" and linear.copies == 1 for linear in linears)
            and _activation(config) in ("silu", "swish"),
            norm_width=(norms - 2) * hidden + (query + key if head_norms or full_norms else 0),
            vocabulary=vocabulary,
            tied=tied,
            linears=linears,
            experts_per_token=max((linear.used for linear in linears if linear.copies > 1), default=0),
            layer_parameters=layer,
            parameters=counted_parameters or total,
            active_parameters=active,
        )

    def lora_linears(self, targets: str | tuple[str, ...]) -> Iterator[Linear]:
        """The layer's matrices that adapters go on: all, or those whose names are listed."""
        for linear in self.linears:
            if targets == "all-linear" or linear.name in targets:
                yield linear


def _attention(config: Mapping[str, Any], model_type: str, hidden: int, query: int, key: int) -> Iterator[Linear]:
    if "kv_lora_rank" in config:
        raise ModelError("Latent attention is not forecast.", where=model_type)
    everywhere = bool(config.get("attention_bias", False)) or bool(config.get("use_bias", False))
    everywhere |= model_type in ("gpt2", "gpt_neox", "phi", "starcoder2")
    inputs = everywhere or model_type in _WITH_QUERY_KEY_BIAS
    if model_type in ("gpt2", "gpt_neox", "phi3"):
        yield Linear("qkv_proj", hidden, query + 2 * key, inputs and model_type != "phi3")
    else:
        yield Linear("q_proj", hidden, query, inputs)
        yield Linear("k_proj", hidden, key, inputs)
        yield Linear("v_proj", hidden, key, inputs)
    yield Linear("o_proj", query, hidden, everywhere and model_type not in ("glm4",))


def _feed_forward(config: Mapping[str, Any], model_type: str, hidden: int, gated: bool) -> Iterator[Linear]:
    inner = int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden)
    experts = int(config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0)
    bias = not gated or bool(config.get("mlp_bias", False))
    if not experts:
        if not gated:
            yield Linear("fc1", hidden, inner, bias)
            yield Linear("fc2", inner, hidden, bias)
            return
        if model_type in _WITH_FUSED_GATE:
            yield Linear("gate_up_proj", hidden, 2 * inner, bias)
        else:
            yield Linear("gate_proj", hidden, inner, bias)
            yield Linear("up_proj", hidden, inner, bias)
        yield Linear("down_proj", inner, hidden, bias)
        return
    used = int(config.get("num_experts_per_tok") or config.get("experts_per_token") or 2)
    width = int(config.get("moe_intermediate_size") or inner)
    yield Linear("router", hidden, experts)
    yield Linear("gate_proj", hidden, width, False, experts, used)
    yield Linear("up_proj", hidden, width, False, experts, used)
    yield Linear("down_proj", width, hidden, False, experts, used)
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    if shared:
        yield Linear("shared_gate_proj", hidden, shared)
        yield Linear("shared_up_proj", hidden, shared)
        yield Linear("shared_down_proj", shared, hidden)
        yield Linear("shared_expert_gate", hidden, 1)


def _activation(config: Mapping[str, Any]) -> str:
    stated = config.get("hidden_act") or config.get("hidden_activation")
    return str(stated or ("gelu" if str(config.get("model_type", "")).startswith("gemma") else "silu"))


def _size(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(f"The model's config states no {names[0]}, so nothing can be forecast.")
