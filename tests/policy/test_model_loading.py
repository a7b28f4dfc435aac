"""A model is loaded whole and comparable, or the message says what is wrong with it."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, build, examples, save, settings, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.batch.layout import pack
from dpo_cli.errors import ModelError
from dpo_cli.policy.load import choose_dtype, load_model, load_reference
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.tokenizer import check_tokenizer_fits, load_tokenizer, stop_token_ids

CPU = torch.device("cpu")


def load(folder: Path | str, **changes: object) -> object:
    return load_model(settings(folder, **changes), device=CPU, seed=0)


def fails(folder: Path | str, **changes: object) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **changes)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_saved_model_loads_with_its_own_weights(tmp_path: Path) -> None:
    loaded = load_model(settings(save(tmp_path)), device=CPU, seed=0)
    original = build("qwen2", dtype=torch.float32).state_dict()
    assert loaded.model.config._attn_implementation == "packed"
    assert loaded.folder == tmp_path
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def test_auto_dtype_is_float32_on_a_cpu_and_bfloat16_on_a_gpu() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_the_asked_dtype_is_used_whatever_the_files_hold(tmp_path: Path) -> None:
    loaded = load_model(settings(save(tmp_path), dtype="bfloat16"), device=CPU, seed=0)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.identity["dtype"] == "bfloat16"


def test_dropout_is_off_in_training_and_remembered_for_the_export(tmp_path: Path) -> None:
    save(tmp_path, "gpt2")
    edit(tmp_path / "config.json", resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3)
    loaded = load_model(settings(tmp_path), device=CPU, seed=0)
    assert loaded.model.training
    packed, row = PackedModel(loaded.model), pack(examples(responses=2))
    assert torch.equal(packed(row).logps, packed(row).logps)
    assert loaded.noise_settings == {"resid_pdrop": 0.1, "attn_pdrop": 0.2, "embd_pdrop": 0.3}


def test_gradient_checkpointing_is_switched_on_as_asked(tmp_path: Path) -> None:
    save(tmp_path)
    for wanted in (True, False):
        loaded = load_model(settings(tmp_path, gradient_checkpointing=wanted), device=CPU, seed=0)
        assert loaded.model.is_activation_checkpointing is wanted


@pytest.mark.parametrize(("every", "computed_again"), [(1, [0, 1]), (2, [0]), (3, [0])])
@pytest.mark.parametrize("offload", [False, True])
def test_of_so_many_layers_one_is_computed_again_and_no_number_changes(
    tmp_path: Path, every: int, computed_again: list[int], offload: bool
) -> None:
    save(tmp_path)
    gradients = []
    for chosen in (
        settings(tmp_path),
        settings(tmp_path, gradient_checkpointing=True, checkpoint_every=every, offload_checkpoints=offload),
    ):
        loaded = load_model(chosen, device=CPU, seed=0)
        calls = [0, 0, 0]
        for number, layer in enumerate(loaded.model.model.layers):

            def count(*_: object, number: int = number, calls: list[int] = calls) -> None:
                calls[number] += 1

            layer.mlp.register_forward_pre_hook(count)
        loaded.packed()(pack(examples(responses=2))).logps.sum().backward()
        gradients.append([p.grad for p in loaded.model.parameters() if p.grad is not None])
    assert calls == [2 if number in computed_again else 1 for number in range(3)]
    assert all(map(torch.equal, *gradients))


def edit(file: Path, **fields: object) -> None:
    content = json.loads(file.read_text())
    content.update(fields)
    file.write_text(json.dumps(content))


# --- what is wrong with a folder -------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there() -> None:
    assert "no model folder ./nowhere" in fails("./nowhere")


def test_a_name_the_hub_cannot_supply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = fails("nobody/no-such-model")
    assert "no folder nobody/no-such-model here" in message
    assert "hub could not be reached" in message


class OtherClientsTimeout(Exception):
    """The hub library's HTTP client has changed before; its errors are no OSErrors."""


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (OtherClientsTimeout(), "hub could not be reached for it (OtherClientsTimeout)"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/blob"), "cannot be stored: No space left on device"),
    ],
)
def test_what_fails_on_the_way_from_the_hub_is_told(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, said: str
) -> None:
    def download(*args: object, local_files_only: bool, **settings: object) -> str:
        raise LocalEntryNotFoundError("not in the cache") if local_files_only else failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert said in fails("nobody/no-such-model")


@pytest.mark.parametrize("name", ["a..b", "org/a--b", "org/model.git"])
def test_a_name_that_can_be_no_hub_name(name: str) -> None:
    assert f"no model folder {name}" in fails(name)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    assert "A model is a folder" in fails(save(tmp_path) / "config.json")


@pytest.mark.parametrize("lost_bytes", [1, 1000])
def test_a_truncated_weight_file_is_named(tmp_path: Path, lost_bytes: int) -> None:
    file = save(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-lost_bytes])
    message = fails(tmp_path)
    assert "cut off" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0{not json at all"])
def test_a_weight_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (save(tmp_path) / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in fails(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (save(tmp_path) / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    assert "git lfs pull" in fails(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (save(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickles (pytorch_model.bin)" in fails(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    build("qwen2").save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    load(tmp_path)
    shard.unlink()
    assert f"{shard.name} is missing" in fails(tmp_path)


def change_weights(folder: Path, change: object) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)  # type: ignore[operator]
    save_file(state, file, metadata={"format": "pt"})


def test_a_layer_the_files_do_not_fill_is_an_error_not_random(tmp_path: Path) -> None:
    change_weights(save(tmp_path), lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    message = fails(tmp_path)
    assert "would be random" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_weights_the_model_has_no_place_for_are_an_error(tmp_path: Path) -> None:
    change_weights(save(tmp_path), lambda state: state.update({"model.layers.0.extra.weight": torch.zeros(3)}))
    assert "no place in the model: model.layers.0.extra.weight" in fails(tmp_path)


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    change_weights(save(tmp_path), lambda state: state.update({"model.norm.weight": torch.zeros(3)}))
    assert "model.norm.weight" in fails(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    (save(tmp_path) / "config.json").unlink()
    assert "no config.json" in fails(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-type"}', "[]"])
def test_an_unreadable_config(tmp_path: Path, content: str) -> None:
    (save(tmp_path) / "config.json").write_text(content)
    assert "config cannot be read" in fails(tmp_path)


def test_an_adapter_folder_given_as_a_model_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "model.adapter=" in fails(tmp_path)


# --- tokenizer ------------------------------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    for file in save(tmp_path).glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in fails(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (save(tmp_path) / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be read" in fails(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_embeddings_have_rows(tmp_path: Path) -> None:
    tiny_tokenizer(size=70).save_pretrained(save(tmp_path))
    message = fails(tmp_path)
    assert "tokens up to id 69" in message
    assert "61 rows" in message


def test_more_rows_than_tokens_is_fine(tmp_path: Path) -> None:
    tiny_tokenizer(size=40).save_pretrained(save(tmp_path))
    load(tmp_path)


def test_stop_tokens_are_those_of_tokenizer_generation_config_and_chat_template(tmp_path: Path) -> None:
    save(tmp_path, chat=True)
    edit(tmp_path / "generation_config.json", eos_token_id=[2, 7])
    assert load_model(settings(tmp_path), device=CPU, seed=0).stop_token_ids == {2, 7, 3}


def test_a_plain_tokenizer_stops_on_its_end_of_text_only() -> None:
    assert stop_token_ids(tiny_tokenizer()) == {2}


def test_a_template_that_writes_the_turn_s_end_as_text_adds_no_stop_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} END {% endfor %}"
    assert stop_token_ids(tokenizer) == {2}


def test_no_token_to_stop_on_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="ends a reply"):
        stop_token_ids(tokenizer)


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [None, "start"])
def test_by_default_the_reference_is_the_policy_s_start_and_nothing_is_loaded(
    tmp_path: Path, reference: str | None
) -> None:
    chosen = settings(save(tmp_path), reference=reference)
    assert load_reference(chosen, load_model(chosen, device=CPU, seed=0), device=CPU) is None


def test_another_model_as_the_reference_is_frozen(tmp_path: Path) -> None:
    save(tmp_path / "policy")
    other = save(tmp_path / "other", "llama", seed=5)
    chosen = settings(tmp_path / "policy", reference=str(other))
    reference = load_reference(chosen, load_model(chosen, device=CPU, seed=0), device=CPU)
    assert reference is not None
    assert reference.folder == other
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_a_reference_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "policy")
    tiny_tokenizer(size=50).save_pretrained(save(tmp_path / "other"))
    chosen = settings(tmp_path / "policy", reference=str(tmp_path / "other"))
    policy = load_model(chosen, device=CPU, seed=0)
    with pytest.raises(ModelError, match="different vocabularies: 11 tokens differ"):
        load_reference(chosen, policy, device=CPU)


def test_a_reference_without_a_tokenizer_takes_the_policy_s(tmp_path: Path) -> None:
    save(tmp_path / "policy")
    for file in save(tmp_path / "other").glob("tokenizer*"):
        file.unlink()
    chosen = settings(tmp_path / "policy", reference=str(tmp_path / "other"))
    policy = load_model(chosen, device=CPU, seed=0)
    reference = load_reference(chosen, policy, device=CPU)
    assert reference is not None
    assert reference.tokenizer is policy.tokenizer


def test_policy_and_reference_of_the_same_folder_score_alike_to_the_bit(tmp_path: Path) -> None:
    save(tmp_path / "policy")
    shutil.copytree(tmp_path / "policy", tmp_path / "copy")
    chosen = settings(tmp_path / "policy", reference=str(tmp_path / "copy"), gradient_checkpointing=True)
    policy = load_model(chosen, device=CPU, seed=0)
    reference = load_reference(chosen, policy, device=CPU)
    assert reference is not None
    row = pack(examples(responses=2))
    ours = PackedModel(policy.model)(row).logps
    with torch.no_grad():
        theirs = PackedModel(reference.model)(row).logps
    assert torch.equal(ours, theirs)
    assert torch.nn.functional.softplus(-(ours - theirs).sum()).item() == pytest.approx(math.log(2), abs=1e-7)


def test_qwen2_s_real_tokenizer_stops_on_its_turn_s_end_and_fits_the_real_embeddings(real_data: Path) -> None:
    """151,646 tokens in 151,936 rows; <|im_end|> ends a turn and <|endoftext|> a text."""
    tokenizer = load_tokenizer(real_data / "qwen2-tokenizer")
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[151645, 151643])) == {151643, 151645}
    fields = SIZES | {"vocab_size": 151_936, "hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **fields))
    check_tokenizer_fits(tokenizer, model, where="folder")
