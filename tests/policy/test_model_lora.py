"""Adapters start as nothing, are merged exactly, and name the reference they stand for."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from tiny_models import build, examples, save, settings
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_cli.batch.layout import pack
from dpo_cli.errors import ModelError
from dpo_cli.policy.load import LoadedModel, load_model, load_reference
from dpo_cli.policy.lora import merged_state_dict
from dpo_cli.policy.packed_model import PackedModel

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0, "target_modules": "all-linear", "merge": True}
ROW = pack(examples(responses=2))


def load(folder: Path, **changes: object) -> LoadedModel:
    return load_model(settings(folder, **changes), device=CPU, seed=3)


def logps(loaded: LoadedModel) -> Tensor:
    with torch.no_grad():
        return PackedModel(loaded.model)(ROW).logps


def save_adapter(base: Path, folder: Path, *, name: str | None = None, seed: int = 1) -> Path:
    """An SFT adapter made by peft itself, with both halves away from zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    wrapped.peft_config["default"].base_model_name_or_path = name or str(base)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe", "phi"])
def test_at_the_start_the_policy_with_adapters_is_the_base_to_the_bit(tmp_path: Path, name: str, dtype: str) -> None:
    save(tmp_path, name)
    base, adapted = load(tmp_path, dtype=dtype), load(tmp_path, dtype=dtype, lora=LORA, gradient_checkpointing=True)
    assert torch.equal(logps(base), logps(adapted))


def test_only_adapters_are_trained_in_float32_and_they_get_gradients(tmp_path: Path) -> None:
    loaded = load(save(tmp_path), dtype="bfloat16", lora=LORA, gradient_checkpointing=True)
    PackedModel(loaded.model)(ROW).logps.sum().backward()
    trained = {name: parameter for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 3  # A and B of seven projections in three layers
    assert all(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert all(
        parameter.grad is not None and parameter.grad.abs().max() > 0
        for name, parameter in trained.items()
        if "lora_B" in name
    )
    assert all(
        parameter.dtype == torch.bfloat16 for parameter in loaded.model.parameters() if not parameter.requires_grad
    )


def test_the_random_half_depends_on_the_seed_alone(tmp_path: Path) -> None:
    chosen = settings(save(tmp_path), lora=LORA)
    states = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        states.append(load_model(chosen, device=CPU, seed=seed).model.state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_merging_gives_the_function_of_the_adapted_model(tmp_path: Path) -> None:
    loaded = load(save(tmp_path), lora=LORA)
    move_adapters(loaded)
    adapted = logps(loaded)
    plain = build("qwen2", dtype=torch.float32)
    plain.load_state_dict(merged_state_dict(loaded.model))
    merged = PackedModel(plain)(ROW).logps
    assert (merged - adapted).abs().max() < 2e-5
    assert (adapted - logps(load(tmp_path))).abs().max() > 0.1
    assert torch.equal(logps(loaded), adapted), "merging must leave the model in training alone"


def test_merging_holds_one_float32_update_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together are twice a bf16 model, on a GPU that may hold little more than the model."""
    loaded = load(save(tmp_path), lora=LORA)
    original = Linear.get_delta_weight
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def counted(self: Linear, adapter: str) -> torch.Tensor:
        nonlocal most
        update = original(self, adapter)
        alive.add(update)
        most = max(most, len(alive))
        return update

    monkeypatch.setattr(Linear, "get_delta_weight", counted)
    merged_state_dict(loaded.model)
    assert most == 1


def move_adapters(loaded: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "embed_tokens"], r".*\.(embed_tokens|q_proj)"])
def test_head_and_embeddings_cannot_be_adapted(tmp_path: Path, targets: str | list[str]) -> None:
    with pytest.raises(ModelError, match="embeddings and output head"):
        load(save(tmp_path), lora=LORA | {"target_modules": targets})


def test_targets_that_match_nothing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing to adapt"):
        load(save(tmp_path), lora=LORA | {"target_modules": ["no_such_proj"]})


# --- an SFT adapter under the policy -----------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(base, tmp_path / "sft")


def test_a_merged_adapter_scores_as_peft_s_own_model(base: Path, adapter: Path) -> None:
    ours = logps(load(base, adapter=str(adapter), reference="start"))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, attn_implementation="packed"), adapter
    )
    assert (ours - PackedModel(theirs.base_model.model)(ROW).logps).abs().max() < 2e-5
    assert (ours - logps(load(base))).abs().max() > 0.1


def test_with_an_adapter_the_reference_must_be_named(base: Path, adapter: Path) -> None:
    chosen = settings(base, adapter=str(adapter))
    with pytest.raises(ModelError, match="reference must be named"):
        load_reference(chosen, load_model(chosen, device=CPU, seed=0), device=CPU)


def test_reference_base_is_the_model_without_its_adapter(base: Path, adapter: Path) -> None:
    chosen = settings(base, adapter=str(adapter), reference="base")
    policy = load_model(chosen, device=CPU, seed=0)
    reference = load_reference(chosen, policy, device=CPU)
    assert reference is not None
    assert torch.equal(logps(reference), logps(load(base)))
    assert reference.identity["adapter"] is None
    assert policy.identity["adapter"] == adapter


def test_reference_start_is_the_model_with_its_adapter(base: Path, adapter: Path) -> None:
    chosen = settings(base, adapter=str(adapter), reference="start", lora=LORA)
    policy = load_model(chosen, device=CPU, seed=0)
    assert load_reference(chosen, policy, device=CPU) is None
    assert torch.equal(logps(policy), logps(load(base, adapter=str(adapter), reference="start")))


def test_an_adapter_folder_as_the_reference_is_the_base_with_it(base: Path, adapter: Path) -> None:
    chosen = settings(base, reference=str(adapter))
    reference = load_reference(chosen, load_model(chosen, device=CPU, seed=0), device=CPU)
    assert reference is not None
    assert torch.equal(logps(reference), logps(load(base, adapter=str(adapter), reference="start")))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    stranger = save_adapter(base, tmp_path / "sft", name="someone/another-model")
    with pytest.raises(ModelError, match="trained on someone/another-model"):
        load(base, adapter=str(stranger))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, adapter: Path) -> None:
    other = save(tmp_path / "other" / "base", "gpt2")
    with pytest.raises(ModelError, match="does not fit"):
        load(other, adapter=str(adapter))


def test_an_adapter_with_tensors_missing_is_refused_not_left_at_zero(base: Path, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    state.pop(next(name for name in state if "layers.1" in name and "lora_B" in name))
    save_file(state, file)
    with pytest.raises(ModelError, match="1 tensors differ"):
        load(base, adapter=str(adapter))


def test_a_pickled_adapter_is_refused(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickles"):
        load(base, adapter=str(adapter))


def test_a_model_folder_given_as_an_adapter_is_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="not a peft adapter"):
        load(base, adapter=str(base))


def test_the_adapter_config_s_scale_is_honoured(base: Path, adapter: Path) -> None:
    before = logps(load(base, adapter=str(adapter), reference="start"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 12}))
    assert not torch.equal(logps(load(base, adapter=str(adapter), reference="start")), before)
