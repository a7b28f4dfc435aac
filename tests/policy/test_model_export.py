"""The final folder is what was trained, whole, and loads anywhere."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import examples, save, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dpo_cli.policy.export as export_module
from dpo_cli.batch.layout import pack
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.export import FinalState, export_final
from dpo_cli.policy.load import LoadedModel, load_model
from dpo_cli.policy.packed_model import PackedModel

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear", "merge": True}
ROW = pack(examples(responses=2))


def trained(folder: Path, **changes: Any) -> LoadedModel:
    """A loaded model whose trainable weights have moved."""
    loaded = load_model(settings(folder, **changes), device=CPU, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return loaded


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3-moe", "gemma3", "phi"])
def test_the_exported_model_is_the_one_in_memory_to_the_bit(tmp_path: Path, name: str) -> None:
    loaded = trained(save(tmp_path / "base", name))
    with torch.no_grad():
        wanted = PackedModel(loaded.model)(ROW).logps
    export_final(loaded, tmp_path / "final", card="# card")
    again = load_model(settings(tmp_path / "final"), device=CPU, seed=0)
    with torch.no_grad():
        assert torch.equal(PackedModel(again.model)(ROW).logps, wanted)


def test_the_folder_holds_everything_a_user_needs_and_nothing_of_ours(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "gpt2", chat=True)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | {"resid_pdrop": 0.1}))
    GenerationConfig(eos_token_id=[2, 3], temperature=0.7, do_sample=True).save_pretrained(base)
    export_final(trained(base), tmp_path / "final", card="# My model\n")
    final = tmp_path / "final"
    config = json.loads((final / "config.json").read_text())
    assert config["resid_pdrop"] == 0.1
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["dtype"] == "float32"
    assert "packed" not in (final / "config.json").read_text()
    assert (final / "README.md").read_text() == "# My model\n"
    assert GenerationConfig.from_pretrained(final).eos_token_id == [2, 3]
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer("0A")["input_ids"] == AutoTokenizer.from_pretrained(base)("0A")["input_ids"]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert not list(final.glob("*.bin"))
    assert not list(tmp_path.glob("final.*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_keep_the_dtype_of_the_run(tmp_path: Path, dtype: str) -> None:
    export_final(trained(save(tmp_path / "base"), dtype=dtype), tmp_path / "final", card="")
    stored = {str(tensor.dtype) for tensor in load_file(tmp_path / "final" / "model.safetensors").values()}
    assert stored == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(("name", "dtype"), [("qwen2", "float32"), ("qwen2", "bfloat16"), ("qwen3-moe", "float32")])
def test_lora_is_merged_and_the_adapter_lies_beside_it(tmp_path: Path, name: str, dtype: str) -> None:
    loaded = trained(save(tmp_path / "base", name), dtype=dtype, lora=LORA)
    with torch.no_grad():
        wanted = PackedModel(loaded.model)(ROW).logps
    export_final(loaded, tmp_path / "final", card="")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final", attn_implementation="packed")
    assert type(final) is type(loaded.model)
    assert final.dtype == loaded.dtype
    with torch.no_grad():
        merged = PackedModel(final)(ROW).logps
    # In bf16 a merged weight is rounded once more than base and adapter apart.
    assert (merged - wanted).abs().mean() < (1e-5 if dtype == "float32" else 0.1)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded.dtype, attn_implementation="packed")
    adapted = PeftModel.from_pretrained(base, tmp_path / "final" / "adapter")
    with torch.no_grad():
        assert torch.equal(PackedModel(adapted.base_model.model)(ROW).logps, wanted)


def test_a_large_model_is_written_in_shards_and_verified(tmp_path: Path) -> None:
    loaded = trained(save(tmp_path / "base"))
    export_final(loaded, tmp_path / "final", card="", max_shard_size="40KB")
    assert len(list((tmp_path / "final").glob("model-*.safetensors"))) > 1


def test_a_generation_config_that_contradicts_itself_does_not_lose_the_model(tmp_path: Path) -> None:
    """Such files are on the hub: a temperature beside do_sample=false."""
    base = save(tmp_path / "base")
    generation = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    (base / "generation_config.json").write_text(json.dumps(generation))
    export_final(trained(base), tmp_path / "final", card="")
    exported = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert {name: exported[name] for name in generation} == generation


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_final(trained(save(tmp_path / "base")), tmp_path / "final", card="")


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_disk_that_fills_is_told_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Each of the libraries that write has an exception of its own for it."""
    loaded = trained(save(tmp_path / "base"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    owner = type(getattr(loaded, part))
    original = owner.save_pretrained

    def disk_fills(self: Any, *args: Any, **kw: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
        try:
            return original(self, *args, **kw)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(owner, "save_pretrained", disk_fills)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File too large"):
        export_final(loaded, tmp_path / "final", card="")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_one_flipped_byte_on_the_way_to_the_disk_is_noticed_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = trained(save(tmp_path / "base"))
    write = export_module._write

    def write_and_damage(loaded: LoadedModel, state: FinalState, folder: Path, card: str, max_shard_size: str) -> None:
        write(loaded, state, folder, card, max_shard_size)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(export_module, "_write", write_and_damage)
    with pytest.raises(CheckpointError, match="1 tensors of the final model read back differently"):
        export_final(loaded, tmp_path / "final", card="")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_exported_model_can_be_trained_further(tmp_path: Path) -> None:
    export_final(trained(save(tmp_path / "base"), lora=LORA), tmp_path / "final", card="")
    again = trained(tmp_path / "final")
    assert again.lora is None
    assert all(parameter.requires_grad for parameter in again.model.parameters())
