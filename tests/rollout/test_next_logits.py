"""The pass written out gives what a model's own forward pass gives, and is used for no model where it would not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY, build
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.data.example import Example
from dpo_cli.policy import products
from dpo_cli.policy.attention import plain_attention
from dpo_cli.policy.lora import add_lora, without_adapters
from dpo_cli.policy.packed_model import PackedModel, score_examples
from dpo_cli.rollout.cache import growing_cache
from dpo_cli.rollout.next_logits import NextLogits, _Decoder, _own, next_logits

SHORT = ("qwen2", "qwen2-tied", "qwen3", "llama", "llama3-rope", "mistral")


@pytest.fixture(autouse=True)
def mistral_without_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = ARCHITECTURES["mistral-sliding"]
    monkeypatch.setitem(ARCHITECTURES, "mistral", (kind, fields | {"sliding_window": None}))


def score_something(model: PreTrainedModel) -> None:
    """Its last layer has then learnt to spare what is not scored."""
    packed = PackedModel(model)
    prompt, response = np.arange(9, dtype=np.int32), np.arange(5, dtype=np.int32)
    score_examples(packed, [Example(prompt, (response,), origin="row")])


def model_of(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return build(name, dtype=dtype).eval()


@torch.no_grad()
def told(way: NextLogits, *, padded: bool = True) -> Tensor:
    """Logits of a prompt, of a token, of several, of which all or some are wanted.

    padded: the prompt is, and one token is not seen by those after it.
    """
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (3, 14), generator=draw)
    seen = torch.ones_like(ids)
    if padded:
        seen[0, :5], seen[1, :2], seen[2, 7] = 0, 0, 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    cache = growing_cache()
    parts = [
        way(ids[:, start:end], seen[:, :end], positions[:, start:end], cache, last)
        for start, end, last in ((0, 6, 1), (6, 7, 1), (7, 8, 1), (8, 11, 3), (11, 14, 2))
    ]
    assert [part.shape[1] for part in parts] == [1, 1, 1, 3, 2]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", SHORT)
def test_the_pass_written_out_gives_the_models_own_logits(name: str, padded: bool) -> None:
    model = model_of(name)
    assert isinstance(next_logits(model), _Decoder)
    # Their own norms round to float32, whatever the weights are.
    found, own = (told(way(model), padded=padded) for way in (next_logits, _own))
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


def test_without_padding_a_prompt_and_a_token_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of a long prompt is large, and keeps GPUs from their fastest kernels."""
    masks: list[bool] = []

    def noted(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        masks.append(mask is not None)
        return plain_attention(module, query, key, value, mask, **kwargs)

    way = next_logits(model_of("qwen2"))
    monkeypatch.setattr("dpo_cli.rollout.next_logits.plain_attention", noted)
    told(way, padded=False)
    assert masks == 3 * [False] + 6 * [False] + 6 * [True]
    masks.clear()
    told(way)
    assert all(masks)


def test_it_does_as_well_in_bfloat16_and_in_a_model_that_learnt_to_score() -> None:
    exact = told(_own(model_of("qwen3", torch.bfloat16).float()))
    model = PackedModel(model_of("qwen3", torch.bfloat16)).model
    assert isinstance(next_logits(model), _Decoder)
    off, own_off = (float((told(way(model)) - exact).norm()) for way in (next_logits, _own))
    assert off < 1.25 * own_off


@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - {*SHORT}))
def test_other_architectures_use_their_own_forward(name: str) -> None:
    assert not isinstance(next_logits(model_of(name)), _Decoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_that_learnt_other_products_keep_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on processors with AVX-512, or in bfloat16 on those without it."""
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    model = model_of("llama", dtype)
    score_something(model)
    assert all(type(module) is not nn.Linear for module in model.get_decoder().modules())
    assert isinstance(next_logits(model), _Decoder)
    score_something(model)
    found, own = (told(way(model)).double() for way in (next_logits, _own))
    assert (found - own).norm() < (1e-5 if dtype == torch.float32 else 0.03) * own.norm()


def test_adapters_count_while_they_are_switched_on() -> None:
    model = model_of("qwen2", torch.float32)
    before = told(next_logits(model))
    settings = SimpleNamespace(rank=2, alpha=4, target_modules=["q_proj", "o_proj", "down_proj"])
    add_lora(model, settings, seed=0, base_name="base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    score_something(model)
    adapted = told(next_logits(model))
    assert isinstance(next_logits(model), _Decoder)
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(adapted, told(_own(model)), rtol=0, atol=1e-4)
    with without_adapters(model):
        torch.testing.assert_close(told(next_logits(model)), before, rtol=0, atol=1e-4)


def scaled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: 1.05 * forward(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_a_known_name_that_computes_something_else_is_found_out(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    for layer in model.model.layers:
        layer.mlp.forward = scaled(layer.mlp.forward)
    assert not isinstance(next_logits(model), _Decoder)


def test_a_model_whose_parts_have_other_names_uses_its_own_forward() -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        del layer.input_layernorm.variance_epsilon
        layer.input_layernorm.forward = torch.nn.Identity()
    assert not isinstance(next_logits(model), _Decoder)


def test_a_row_that_sees_nothing_yet_spoils_no_other() -> None:
    """What padding sees must be a number, or what does not look at it becomes none."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert told(_Decoder(model_of("qwen2", dtype))).isfinite().all()


def test_a_model_is_tried_once() -> None:
    model, passes = model_of("qwen2"), []
    model.model.embed_tokens.register_forward_pre_hook(lambda *args: passes.append(args))
    for _ in range(3):
        next_logits(model)
    assert len(passes) == 4
