"""Scores belong to a model by what changes its numbers, and a miss can be explained."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import Qwen2Config

from dpo_cli import atomic
from dpo_cli.errors import ModelError
from dpo_cli.reference import identity as identity_module
from dpo_cli.reference.identity import ModelIdentity, model_identity, remembered_hash
from dpo_cli.reference.store import open_store

CONFIG = Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}).to_dict()


def _save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.random.default_rng(seed).random((64, 64))}, path)


def _age(path: Path) -> None:
    """Only files that have been left alone for some seconds are remembered."""
    past = time.time() - 3600
    os.utime(path, (past, past))


@pytest.fixture
def identify(tmp_path: Path) -> Callable[..., ModelIdentity]:
    folder = tmp_path / "model"
    _save(folder / "model.safetensors", 0)

    def identify(**changes: Any) -> ModelIdentity:
        arguments: dict[str, Any] = {
            "adapter": None,
            "config": CONFIG,
            "dtype": "float32",
            "attention_route": "sdpa",
            "cache_dir": tmp_path / "hashes",
        }
        return model_identity(changes.pop("folder", folder), **(arguments | changes))

    return identify


Identify = Callable[..., ModelIdentity]


def _adapter(folder: Path, *, alpha: int = 16, seed: int = 1, targets: tuple[str, ...] = ("q", "k")) -> Path:
    _save(folder / "adapter_model.safetensors", seed)
    settings = {"lora_alpha": alpha, "target_modules": list(targets), "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_a_copy_of_the_model_with_other_notes_in_its_config_is_the_same(identify: Identify, tmp_path: Path) -> None:
    copied = shutil.copytree(tmp_path / "model", tmp_path / "copy")
    notes = {"transformers_version": "4.0", "_name_or_path": "elsewhere", "use_cache": False, "dtype": "bfloat16"}
    assert identify().key == identify(folder=copied, config=CONFIG | notes | {"attention_dropout": 0.1}).key


def test_a_run_may_go_on_with_another_kernel_but_not_with_another_model(identify: Identify) -> None:
    began = identify().experiment_key
    assert identify(attention_route="flash").experiment_key == began
    assert identify(dtype="bfloat16").experiment_key != began


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"attention_route": "flash"},
        {"config": CONFIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}},
        {"config": CONFIG | {"use_sliding_window": True, "sliding_window": 128}},
        {"config": CONFIG | {"final_logit_softcapping": 30.0}},
        {"config": CONFIG | {"quantization_config": {"bits": 4}}},
    ],
)
def test_whatever_changes_a_number_changes_the_identity(identify: Identify, change: dict[str, Any]) -> None:
    assert identify().key != identify(**change).key


def test_other_weights_or_an_adapter_or_its_scale_are_another_model(identify: Identify, tmp_path: Path) -> None:
    _save(tmp_path / "other" / "model.safetensors", 1)
    found = [
        identify(),
        identify(folder=tmp_path / "other"),
        identify(adapter=_adapter(tmp_path / "a")),
        identify(adapter=_adapter(tmp_path / "b", alpha=32)),
        identify(adapter=_adapter(tmp_path / "c", seed=2)),
    ]
    assert len({one.key for one in found}) == 5
    again = _adapter(tmp_path / "d", targets=("k", "q"))
    assert identify(adapter=again).key == found[2].key, "peft saves a set in any order"


def test_a_folder_without_weights_is_refused(identify: Identify, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no model weights"):
        identify(folder=tmp_path / "empty")


def test_an_optimizer_state_beside_the_weights_is_not_the_model(identify: Identify, tmp_path: Path) -> None:
    before = identify().key
    _save(tmp_path / "model" / "optimizer.safetensors", 3)
    assert identify().key == before


# ---- remembering hashes


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content was really read, in order."""
    names: list[str] = []

    def recorded(path: Path) -> str:
        names.append(path.name)
        return atomic.content_hash(path)

    monkeypatch.setattr(identity_module, "content_hash", recorded)
    monkeypatch.setattr(identity_module, "_SETTLED_SECONDS", -1.0)
    return names


def test_an_untouched_file_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    _save(tmp_path / "w.safetensors", 0)
    first = remembered_hash(tmp_path / "w.safetensors", tmp_path / "hashes")
    assert remembered_hash(tmp_path / "w.safetensors", tmp_path / "hashes") == first
    assert hashed == ["w.safetensors"]


def test_a_file_replaced_with_its_old_size_and_time_is_read_again(tmp_path: Path, hashed: list[str]) -> None:
    path = tmp_path / "w.safetensors"
    _save(path, 0)
    _age(path)
    status = path.stat()
    first = remembered_hash(path, tmp_path / "hashes")
    _save(tmp_path / "other.safetensors", 1)
    path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_ino, now.st_mtime_ns) == (status.st_size, status.st_ino, status.st_mtime_ns)
    assert remembered_hash(path, tmp_path / "hashes") != first


def test_a_damaged_or_read_only_memory_costs_time_only(tmp_path: Path, hashed: list[str]) -> None:
    _save(tmp_path / "w.safetensors", 0)
    first = remembered_hash(tmp_path / "w.safetensors", tmp_path / "hashes")
    next((tmp_path / "hashes").iterdir()).write_text("{half a")
    assert remembered_hash(tmp_path / "w.safetensors", tmp_path / "hashes") == first
    (tmp_path / "file").touch()
    assert remembered_hash(tmp_path / "w.safetensors", tmp_path / "file") == first


def test_a_file_written_this_moment_is_not_remembered(tmp_path: Path) -> None:
    _save(tmp_path / "w.safetensors", 0)
    remembered_hash(tmp_path / "w.safetensors", tmp_path / "hashes")
    assert not (tmp_path / "hashes").exists()


def test_the_hash_of_a_large_file_does_not_depend_on_how_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_CHUNK_BYTES", 1000)
    whole = np.random.default_rng(0).bytes(10_500)
    (tmp_path / "a").write_bytes(whole)
    first = atomic.content_hash(tmp_path / "a")
    assert first == atomic.content_hash(tmp_path / "a")
    seen = {first}
    for position in range(0, len(whole), 500):
        changed = bytearray(whole)
        changed[position] ^= 1
        (tmp_path / "a").write_bytes(changed)
        seen.add(atomic.content_hash(tmp_path / "a"))
    (tmp_path / "a").write_bytes(whole + b"\0")
    seen.add(atomic.content_hash(tmp_path / "a"))
    assert len(seen) == 23


# ---- why


def _score_something(store_dir: Path, identity: ModelIdentity) -> str:
    store = open_store(store_dir, identity)
    with store.writer() as writer:
        writer.add([b"k" * 16], [np.zeros(2, np.float32)])
    return store.why_new


def test_a_miss_names_what_differs_from_the_nearest_model_scored_before(identify: Identify, tmp_path: Path) -> None:
    store_dir = tmp_path / "store"
    assert _score_something(store_dir, identify()) == "no scores of any model in this store yet"
    _save(tmp_path / "other" / "model.safetensors", 1)
    cases = {
        "dtype differs: float32 -> bfloat16": identify(dtype="bfloat16"),
        "model weights changed: model.safetensors": identify(folder=tmp_path / "other"),
        "model config changed: sliding_window": identify(
            config=CONFIG | {"use_sliding_window": True, "sliding_window": 9}
        ),
        "attention route differs: sdpa -> flash": identify(attention_route="flash"),
    }
    for words, identity in cases.items():
        assert words in open_store(store_dir, identity).why_new


def test_a_model_that_was_never_scored_explains_nothing(identify: Identify, tmp_path: Path) -> None:
    open_store(tmp_path / "store", identify())
    assert open_store(tmp_path / "store", identify(dtype="bfloat16")).why_new.startswith("no scores of any model")
