"""Models that packed rows would score wrongly are refused, by the configs they really have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SIZES
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_cli.errors import ModelError
from dpo_cli.policy.compatibility import check_config, check_model_class, check_modules, sliding_window


def refusal(model_type: str, *, max_tokens: int | None = None, **fields: Any) -> str:
    """The first of the three checks that speaks, in the order a load runs them."""
    config = AutoConfig.for_model(model_type, **fields)
    try:
        check_config(config, where="folder", max_tokens=max_tokens)
        check_model_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], where="folder")
        with torch.device("meta"):
            check_modules(AutoModelForCausalLM.from_config(config), where="folder")
    except ModelError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt_oss", "attention sinks"),
        ("gemma2", "soft-capped attention"),
        ("llama4_text", "chunked"),
        ("mamba", "linear_attention"),
        ("mamba2", "linear_attention"),
        ("rwkv", "recurrent state"),
        ("recurrent_gemma", "recurrent"),
        ("falcon_mamba", "linear_attention"),
        ("jamba", "linear_attention"),
        ("bamba", "linear_attention"),
        ("falcon_h1", "hybrid"),
        ("qwen3_next", "linear_attention"),
        ("granitemoehybrid", "linear_attention"),
        ("deepseek_v32", "indexed_attention"),
        ("bloom", "attention interface"),
        ("mpt", "attention interface"),
        ("t5", "encoder"),
        ("gemma3", "more than a text model"),
    ],
)
def test_is_refused(model_type: str, why: str) -> None:
    assert why in refusal(model_type)


def test_convolutions_between_tokens_are_refused() -> None:
    assert "layers of type conv" in refusal("lfm2", full_attn_idxs=[0], num_hidden_layers=2)


def test_a_module_that_mixes_tokens_is_found_whatever_the_config_says() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 3))
    with pytest.raises(ModelError, match="a Conv1d at 1, which mixes neighbouring tokens"):
        check_modules(model, where="folder")


def test_alibi_is_refused_where_the_same_family_with_rope_is_not_for_it() -> None:
    assert "ALiBi" in refusal("falcon", alibi=True)


def test_quantised_weights_are_refused() -> None:
    assert "quantised" in refusal("qwen2", quantization_config={"quant_method": "gptq", "bits": 4})


def test_rope_that_grows_with_the_longest_sequence_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "longest sequence at hand" in refusal("llama", rope_parameters=rope)


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64, "factor": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(("max_tokens", "refused"), [(None, True), (65, True), (64, False)])
def test_longrope_is_taken_up_to_the_length_where_it_switches(max_tokens: int | None, refused: bool) -> None:
    """One long example would otherwise change the numbers of its neighbours in the row."""
    config = AutoConfig.for_model("phi3", **SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=64)
    if refused:
        with pytest.raises(ModelError, match=r"data\.max_tokens=64"):
            check_config(config, where="folder", max_tokens=max_tokens)
    else:
        check_config(config, where="folder", max_tokens=max_tokens)


@pytest.mark.parametrize(
    "model_type",
    ["qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "mixtral", "phi3", "gemma", "gemma3_text", "olmo2", "olmo3"]
    + ["granite", "cohere", "cohere2", "starcoder2", "gpt2", "gpt_neox", "smollm3", "glm4", "deepseek_v3"],
)
def test_is_accepted_with_its_default_config(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    check_config(config, where="folder", max_tokens=4096)
    check_model_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], where="folder")


@pytest.mark.parametrize(
    ("model_type", "fields", "window"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 3}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 8),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 8}, 8),
        # Its layers are all of one kind, and do not ask which.
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, 8),
        ("llama", {}, None),
    ],
)
def test_a_window_is_in_use_where_a_model_of_this_config_uses_one(
    model_type: str, fields: dict[str, Any], window: int | None
) -> None:
    config = AutoConfig.for_model(model_type, **SIZES, **fields)
    assert sliding_window(config) == window
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        whole, shorter = (
            model(ids[:, start:], position_ids=torch.arange(start, 40)[None]).logits[0, -1] for start in (0, 1)
        )
    # Through three layers the last of 40 tokens sees the first if any layer has no window.
    sees_all = window is None or model_type == "qwen2"
    assert ((whole - shorter).abs().max() > 1e-5) == sees_all
