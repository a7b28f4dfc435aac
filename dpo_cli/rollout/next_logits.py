"""The logits of what a model says next, from a forward pass in as few operations as it can be.

A pass over some tens of tokens is hundreds of small operations, and takes the time of starting them, not that of their
arithmetic, on a CPU as on a GPU. For Llama, and for architectures that differ from it only in biases and in norms of
heads, what a layer computes is written out here without the calls, copies and casts that transformers needs for all
else that it can do. Each such model is tried once: where it gives other logits, and for all other architectures, it is
the model's own forward pass that is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from dpo_cli.policy.attention import plain_attention
from dpo_cli.policy.compatibility import sliding_window
from dpo_cli.rollout.cache import growing_cache

# Called with
#   ids, positions  (rows, new): the tokens that are new, and their positions
#   seen            (rows, tokens): 1 where a token of the cache or a new one counts, 0 where it does not
#   cache           of the tokens before; the new ones are added
#   last            of so many of the new tokens logits are wanted
# it returns (rows, last, vocabulary).
NextLogits = Callable[[Tensor, Tensor, Tensor, Cache, int], Tensor]

_LIKE_LLAMA = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
# How far the logits of the two ways may lie apart, in parts of their size.
_TOLERANCE = 1e-3
_TOLERANCE_OF_16_BITS = 0.05

# Weight and bias, or a layer that is more than these: with an adapter, or with products of its own.
_Linear = tuple[Tensor, Tensor | None] | nn.Module
# Weight and epsilon.
_Norm = tuple[Tensor, float]


def next_logits(model: PreTrainedModel) -> NextLogits:
    """For as long as the model's weights stay where they are. The model is in evaluation mode."""
    return _Decoder(model) if _may_be_short(model) else _own(model)


def _own(model: PreTrainedModel) -> NextLogits:
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(ids: Tensor, seen: Tensor, positions: Tensor, cache: Cache, last: int) -> Tensor:
        keep: dict[str, Any] = {"logits_to_keep": last} if keeps else {}
        found: Tensor = model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True, **keep
        ).logits
        return found[:, -last:]

    return logits


_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _may_be_short(model: PreTrainedModel) -> bool:
    if model not in _tried:
        kind = type(model)
        like = kind.__name__ in _LIKE_LLAMA and kind.__module__.startswith("transformers.models.")
        _tried[model] = like and sliding_window(model.config) is None and _agree(model)
    return _tried[model]


@torch.no_grad()
def _agree(model: PreTrainedModel) -> bool:
    """Whether the two ways do, on random tokens, some of them padding, without a cache and then with one."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 8), generator=draw).to(model.device)
    seen = torch.ones_like(ids)
    seen[0, :3] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    try:
        ways = _own(model), _Decoder(model)
    except AttributeError:
        # Its parts have other names than in the versions of transformers that are known.
        return False
    told: list[list[Tensor]] = []
    for way in ways:
        cache = growing_cache()
        told.append([
            way(ids[:, start:end], seen[:, :end], positions[:, start:end], cache, last).double()
            for start, end, last in ((0, 5, 2), (5, 8, 3))
        ])  # fmt: skip
    own, found = map(partial(torch.cat, dim=1), told)
    tolerance = _TOLERANCE if model.dtype.itemsize > 2 else _TOLERANCE_OF_16_BITS
    return bool((own - found).norm() <= tolerance * own.norm())


@dataclass(frozen=True)
class _Pass:
    """What all layers of a pass share. rotation: cosines and sines, (rows, new, 1, width), for `_rotated`."""

    rows: int
    rotation: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: Cache


class _Decoder:
    """The pass, written out: a NextLogits."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.get_decoder()
        self._embed, self._rotary, self._head = decoder.embed_tokens, decoder.rotary_emb, model.get_output_embeddings()
        self._layers = [_Layer(layer, number) for number, layer in enumerate(decoder.layers)]
        self._norm = _norm(decoder.norm)

    def __call__(self, ids: Tensor, seen: Tensor, positions: Tensor, cache: Cache, last: int) -> Tensor:
        rows, new = ids.shape
        embedded = self._embed(ids)
        cos, sin = self._rotary(embedded, positions)
        low, high = sin[:, :, None].chunk(2, dim=-1)
        rotation = cos[:, :, None], torch.cat([-low, high], dim=-1)
        shared = _Pass(rows, rotation, _mask(seen, new, embedded.dtype), cache)
        hidden = embedded.flatten(0, 1)
        *others, final = self._layers
        for layer in others:
            hidden = layer(hidden, shared, new)
        hidden = final(hidden, shared, last)
        logits: Tensor = self._head(_normed(hidden.view(rows, last, -1), self._norm))
        return logits


class _Layer:
    def __init__(self, layer: Any, number: int) -> None:
        attention, network = layer.self_attn, layer.mlp
        self._attention, self._number = attention, number
        self._before_attention, self._before_network = map(
            _norm, (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self._of_heads = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self._q, self._k, self._v = map(_linear, (attention.q_proj, attention.k_proj, attention.v_proj))
        self._o, self._down = map(_linear, (attention.o_proj, network.down_proj))
        self._gate, self._up, self._activation = _linear(network.gate_proj), _linear(network.up_proj), network.act_fn

    def __call__(self, hidden: Tensor, shared: _Pass, last: int) -> Tensor:
        """(rows * new, d) -> (rows * last, d): of all new tokens keys and values, of the last ones the rest."""
        attended = self._attend(_normed(hidden, self._before_attention), shared)
        hidden, attended = (
            states.view(shared.rows, -1, states.shape[1])[:, -last:].flatten(0, 1) for states in (hidden, attended)
        )
        hidden = _plus(hidden, attended, self._o)
        normed = _normed(hidden, self._before_network)
        product = self._activation(_times(normed, self._gate)).mul_(_times(normed, self._up))
        return _plus(hidden, product, self._down)

    def _attend(self, normed: Tensor, shared: _Pass) -> Tensor:
        """(rows * new, d) -> (rows * new, heads * width)."""
        shape = (shared.rows, len(normed) // shared.rows, -1, self._attention.head_dim)
        q, k, v = (_times(normed, part).view(shape) for part in (self._q, self._k, self._v))
        if self._of_heads is not None:
            q, k = (_normed(states, norm) for states, norm in zip((q, k), self._of_heads, strict=True))
        heads = q.shape[2]
        both = _rotated(torch.cat([q, k], dim=2), *shared.rotation).transpose(1, 2)
        keys, values = shared.cache.update(both[:, heads:], v.transpose(1, 2), self._number)
        attended, _ = plain_attention(
            self._attention, both[:, :heads], keys, values, shared.mask, dropout=0.0, scaling=self._attention.scaling
        )
        return attended.view(len(normed), -1)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Halves a and b of (..., width) -> (a cos - b sin, b cos + a sin). sin: its first half negated."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def _mask(seen: Tensor, new: int, dtype: torch.dtype) -> Tensor | None:
    """(rows, 1, new, tokens), to be added to scores; None where attention without one is causal or sees everything.

    Not infinite: what sees nothing, padding, would become NaN, and make all that does not look at it NaN.
    """
    tokens = seen.shape[1]
    if new in (1, tokens) and bool(seen.all()):
        return None
    hidden = seen[:, None, None] == 0
    if new > 1:
        hidden = hidden | seen.new_ones(new, tokens, dtype=torch.bool).triu_(tokens - new + 1)
    return torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill_(hidden, torch.finfo(dtype).min / 2)


def _linear(module: nn.Module) -> _Linear:
    return (module.weight, module.bias) if type(module) is nn.Linear else module


def _norm(module: Any) -> _Norm:
    return module.weight, module.variance_epsilon


def _normed(states: Tensor, norm: _Norm) -> Tensor:
    weight, epsilon = norm
    return F.rms_norm(states, weight.shape, weight, epsilon)


def _times(states: Tensor, linear: _Linear) -> Tensor:
    """(n, in) -> (n, out)."""
    if isinstance(linear, tuple):
        return F.linear(states, *linear)
    product: Tensor = linear(states)
    return product


def _plus(residual: Tensor, states: Tensor, linear: _Linear) -> Tensor:
    """residual + linear(states): (n, out) of (n, out) and (n, in)."""
    if isinstance(linear, tuple) and linear[1] is None:
        return torch.addmm(residual, states, linear[0].T)
    return residual + _times(states, linear)
