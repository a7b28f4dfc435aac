"""A model's parameters are counted from its config alone, to the last one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forecast_shapes import QWEN2_HALF_BILLION, QWEN2_SEVEN_BILLION

from dpo_cli.errors import ModelError
from dpo_cli.forecast.model_files import read_shape
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.paths import resolve_path

_COUNTED = [
    "llama", "mistral", "phi3", "gemma", "gemma3_text", "qwen2", "qwen3", "olmo2", "qwen3_moe", "qwen2_moe", "mixtral",
    "cohere", "granite", "starcoder2", "phi", "gpt2", "gpt_neox", "smollm3", "glm4", "exaone4",
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"), [(QWEN2_HALF_BILLION, 494_032_768), (QWEN2_SEVEN_BILLION, 7_615_616_512)]
)
def test_qwen2_has_the_parameters_its_card_says(config: dict[str, object], parameters: int) -> None:
    assert ModelShape.of(config).parameters == parameters


@pytest.mark.parametrize("model_type", _COUNTED)
def test_a_count_from_the_config_is_that_of_the_model(model_type: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 200, "pad_token_id": 0,
    }  # fmt: skip
    if model_type != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    if model_type == "gpt2":
        sizes["n_inner"] = sizes.pop("intermediate_size")
    if model_type in ("qwen2_moe", "qwen3_moe"):
        sizes |= {"num_experts": 4, "moe_intermediate_size": 24}
    if model_type == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = 40
    config = AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # What transformers writes to disk, defaults left out as it leaves them out.
    assert ModelShape.of(config.to_diff_dict() | {"model_type": model_type}).parameters == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_active_parameters_of_a_mixture_are_those_of_the_experts_that_are_asked() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "head_dim": 8}
    shape = ModelShape.of({"model_type": "qwen3_moe", **sizes, **experts})
    attention, router, expert, head = 4 * 8 * 8, 8 * 4, 3 * 8 * 5, 10 * 8
    assert shape.active_parameters == attention + router + 2 * expert + head
    assert shape.parameters == attention + router + 4 * expert + 2 * head + (8 + 8) + (8 + 8) + 8


def test_weight_files_count_more_than_the_config(tmp_path: Path) -> None:
    base = Path(resolve_path("dpo_cli://example/base"))
    from_files, said = read_shape(str(base), None)
    assert "weight files" in said
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    from_config, said = read_shape(str(tmp_path), None)
    assert said == "config.json"
    assert from_files == from_config
    assert from_files.parameters == 286_944


@pytest.mark.parametrize(("content", "told"), [("{", "cannot be read"), ("[]", "section"), ("{}", "hidden_size")])
def test_a_config_without_sizes_is_refused(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=told):
        read_shape(str(tmp_path), None)


def test_latent_attention_is_not_guessed_at() -> None:
    with pytest.raises(ModelError, match="not forecast"):
        ModelShape.of(QWEN2_HALF_BILLION | {"model_type": "deepseek_v3", "kv_lora_rank": 512})


def test_a_forecast_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_SEVEN_BILLION))
    program = (
        "import sys; from dpo_cli.forecast.model_files import read_shape; from dpo_cli.forecast import plan, report;"
        f"read_shape({str(tmp_path)!r}, None); print(sorted({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
