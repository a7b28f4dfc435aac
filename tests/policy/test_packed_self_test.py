"""The self-test passes what is right and stops what is wrong, on every architecture and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY, build

from dpo_cli.errors import ModelError
from dpo_cli.policy.attention import plan_attention
from dpo_cli.policy.attention_routes import PLAIN, AttentionRoute
from dpo_cli.policy.head import LogitTransform
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.self_test import SelfTest, packed_self_test


def run(model: Any, attention: AttentionRoute = PLAIN) -> SelfTest:
    return packed_self_test(PackedModel(model, attention=attention), vocabulary=VOCABULARY, where="folder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_passes_every_supported_architecture(name: str, dtype: torch.dtype) -> None:
    found = run(build(name, dtype=dtype))
    assert found.tokens == 30
    assert found.mean_difference < (1e-5 if dtype == torch.float32 else 0.2)


def test_says_whether_a_window_was_tested() -> None:
    assert run(build("qwen2")).window_tested is None
    assert run(build("mistral-sliding")).window_tested is True
    assert run(build("gemma3-softcap")).window_tested is False  # 4,096: rows that long are not worth it on a CPU


def test_leaves_the_model_as_it_was() -> None:
    model = build("gemma3", dtype=torch.float32)
    before, random_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    run(model)
    assert model.training
    assert model.config._attn_implementation == "packed"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
class TestStops:
    def test_a_window_that_is_ignored(self, dtype: torch.dtype) -> None:
        model = build("mistral-sliding", dtype=dtype)
        for layer in model.model.layers:
            layer.self_attn.config = type(model.config).from_dict({**model.config.to_dict(), "sliding_window": None})
            layer.self_attn.config._attn_implementation = "packed"
        with pytest.raises(ModelError, match="score MistralForCausalLM wrongly"):
            run(model)

    def test_a_logit_scale_that_is_forgotten(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(LogitTransform, "of", classmethod(lambda cls, config: cls()))
        with pytest.raises(ModelError, match="score GraniteForCausalLM wrongly"):
            run(build("granite", dtype=dtype))

    def test_responses_that_see_each_other(self, dtype: torch.dtype) -> None:
        def leaky(segments: Any, device: torch.device) -> Any:
            return plan_attention([segment._replace(prefix_end=segment.query_start) for segment in segments], device)

        with pytest.raises(ModelError, match="wrongly"):
            run(build("qwen2", dtype=dtype), AttentionRoute("leaky", leaky))

    def test_log_probs_that_are_not_numbers(self, dtype: torch.dtype) -> None:
        model = build("qwen2", dtype=dtype)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        with pytest.raises(ModelError, match="wrongly"):
            run(model)
