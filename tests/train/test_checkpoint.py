"""A checkpoint is whole or absent, whatever happens while it is written; a damaged one is noticed and passed over."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_cli.engine.interface import SavedTensor
from dpo_cli.errors import CheckpointError
from dpo_cli.train import checkpoint as checkpoint_module
from dpo_cli.train.checkpoint import CheckpointStore


def _tensors(seed: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 5, generator=generator)
    return {
        "policy": {"layer.weight": weight, "layer.bias": torch.randn(5, generator=generator).bfloat16()},
        "optimizer": {"layer.weight.exp_avg": weight * 2, "layer.weight.step": torch.tensor(float(seed))},
        "rng": {"cpu": generator.get_state(), "empty": torch.zeros(0, dtype=torch.int64)},
    }


def _flat(groups: dict[str, dict[str, Tensor]]) -> Iterator[SavedTensor]:
    return (SavedTensor(group, name, tensor) for group, tensors in groups.items() for name, tensor in tensors.items())


def _save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, _flat(_tensors(step)), {"step": step, "window": [0.1, 1e-300]})


def _is_whole(store: CheckpointStore) -> int:
    """The step of the latest good checkpoint, after comparing every bit of it with what was saved."""
    found = store.latest_good()
    assert found is not None
    saved = _tensors(found.step)
    loaded = store.load(found)
    assert found.state["step"] == found.step
    assert loaded.keys() == saved.keys()
    for group, tensors in saved.items():
        assert loaded[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[group][name].dtype == tensor.dtype
            assert torch.equal(loaded[group][name], tensor)
    return found.step


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def test_what_was_saved_comes_back_bit_for_bit(store: CheckpointStore) -> None:
    folder = _save(store, 50)
    assert folder.name == "step-00000050"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        "optimizer-00000-00000.safetensors",
        "policy-00000-00000.safetensors",
        "rng-00000-00000.safetensors",
        "state.json",
    ]
    assert _is_whole(store) == 50


def test_every_float_of_the_state_survives_also_those_json_has_no_word_for(store: CheckpointStore) -> None:
    values = [0.1, 1 / 3, 5e-324, float("inf"), -0.0, 123456789.123456789]
    store.save(1, [], {"values": values, "nan": float("nan")})
    found = store.latest_good()
    assert found is not None
    assert [v.hex() for v in found.state["values"]] == [v.hex() for v in values]
    assert found.state["nan"] != found.state["nan"]


def test_tied_and_transposed_tensors_and_nan_bits_come_back_as_they_are(store: CheckpointStore) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    tied[0, 0] = float("nan")
    store.save(1, _flat({"policy": {"a": tied, "b": tied, "row": tied[1], "t": tied.T}}), {})
    found = store.latest_good()
    assert found is not None
    loaded = store.load(found)["policy"]
    for name, tensor in {"a": tied, "b": tied, "row": tied[1], "t": tied.T}.items():
        assert torch.equal(loaded[name], tensor) or torch.equal(loaded[name].isnan(), tensor.isnan())
    assert torch.equal(tied.view(torch.int32), loaded["a"].view(torch.int32))


def test_no_checkpoint_is_none(store: CheckpointStore) -> None:
    store.recover()
    assert store.latest_good() is None


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    for step in (10, 20, 30, 40, 50):
        _save(store, step)
    assert sorted(path.name for path in store.folder.iterdir()) == [f"step-000000{step}" for step in (30, 40, 50)]


def test_saving_a_step_a_second_time_replaces_it(store: CheckpointStore) -> None:
    store.save(5, _flat(_tensors(99)), {})
    _save(store, 5)
    assert _is_whole(store) == 5
    assert len(list(store.folder.iterdir())) == 1


def test_saving_the_same_state_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (_save(CheckpointStore(tmp_path / name, keep=1), 3) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


# ---- damage


@pytest.mark.parametrize("name", ["policy", "optimizer", "rng"])
def test_any_flipped_byte_of_a_tensor_file_is_noticed(tmp_path: Path, name: str) -> None:
    told: list[str] = []
    store = CheckpointStore(tmp_path, keep=2, notify=told.append)
    _save(store, 1)
    path = _save(store, 2) / f"{name}-00000-00000.safetensors"
    content = path.read_bytes()
    for position in {0, 8, 40, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert _is_whole(store) == 1
        assert "step-00000002 is damaged" in told[-1]
    assert any(f"{name}-00000-00000.safetensors is not what manifest.json says" in message for message in told)
    path.write_bytes(content)
    assert _is_whole(store) == 2


def test_every_flipped_bit_of_state_and_manifest_is_noticed_or_harmless(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    _save(store, 1)
    folder = _save(store, 2)
    for name in ("state.json", "manifest.json"):
        content = (folder / name).read_bytes()
        for position in range(0, len(content), 7):
            flipped = bytes([content[position] ^ (1 << position % 8)])
            (folder / name).write_bytes(content[:position] + flipped + content[position + 1 :])
            assert _is_whole(store) in (1, 2)
            if name == "state.json":
                assert store.latest_good().step == 1  # type: ignore[union-attr]
        (folder / name).write_bytes(content)
    assert _is_whole(store) == 2


@pytest.mark.parametrize("name", ["policy-00000-00000.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("keep", [0.0, 0.5, None])
def test_a_truncated_or_missing_file_is_named_and_the_one_before_used(
    tmp_path: Path, name: str, keep: float | None
) -> None:
    told: list[str] = []
    store = CheckpointStore(tmp_path, keep=2, notify=told.append)
    _save(store, 1)
    path = _save(store, 2) / name
    if keep is None:
        path.unlink()
    else:
        os.truncate(path, int(keep * path.stat().st_size))
    assert _is_whole(store) == 1
    assert len(told) == 1
    assert name in told[0]
    assert ("is missing" in told[0]) == (keep is None)


def test_a_checkpoint_renamed_to_another_step_is_not_believed(store: CheckpointStore) -> None:
    _save(store, 1)
    _save(store, 2).rename(store.folder / "step-00000003")
    assert _is_whole(store) == 1


def test_a_damaged_later_checkpoint_never_pushes_a_good_one_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    (_save(store, 100) / "state.json").write_text("{}")
    _save(store, 60)
    assert _is_whole(store) == 60
    _save(store, 70)
    assert _is_whole(store) == 70
    _save(store, 100)
    assert _is_whole(store) == 100
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_gives_back_other_bytes_is_caught_before_anything_is_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    _save(store, 1)

    def forgetful(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    # Where the file leaves the cache is where a bad disk would show.
    monkeypatch.setattr(checkpoint_module, "_forget_cached", forgetful)
    with pytest.raises(CheckpointError, match="read back other than it was written"):
        _save(store, 2)
    assert _is_whole(store) == 1
    assert len(list(tmp_path.iterdir())) == 1


# ---- a full disk


@pytest.mark.parametrize("believed_free", [None, 10**9])
def test_a_full_disk_keeps_the_earlier_checkpoint_and_says_how_much_is_needed(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, believed_free: int | None
) -> None:
    """Also when the disk seemed to have room (a quota, another process) and fills while it is written."""
    store = CheckpointStore(small_disk / "checkpoints", keep=1)
    _save(store, 1)
    if believed_free is not None:
        monkeypatch.setattr(checkpoint_module, "_free_bytes", lambda folder: believed_free)
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written: the disk is full \(8 MB needed, .* free\)"):
        big = {"a": {"small": torch.zeros(10)}, "policy": {"big": torch.zeros(2_000_000)}}
        store.save(2, _flat(big), {}, needed=8_000_040)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert _is_whole(store) == 1


def test_a_disk_too_small_for_a_checkpoint_is_told_before_the_run(tmp_path: Path) -> None:
    told: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=3, notify=told.append)
    free = shutil.disk_usage(tmp_path).free
    store.check_room(1000)
    assert told == []
    store.check_room(free // 2)
    assert "3 checkpoints and one that is being written" in told[0]
    with pytest.raises(CheckpointError, match=r"a checkpoint takes .* and the disk has .* free"):
        store.check_room(2 * free)


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _save(CheckpointStore(tmp_path / "checkpoints", keep=1), 1)


# ---- kills


def _slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def paused(*arguments: Any, **options: Any) -> Any:
        time.sleep(random.random() * 0.004)
        result = function(*arguments, **options)
        time.sleep(random.random() * 0.004)
        return result

    return paused


def _save_for_ever(folder: Path, step: int, saved: Connection) -> None:
    """Save with random pauses around whatever touches the disk: plain kills rarely hit the moments in between."""
    random.seed()
    for name in ("_write_part", "_write_synced", "_remove", "describe", "sync_file", "sync_folder"):
        setattr(checkpoint_module, name, _slowly(getattr(checkpoint_module, name)))
    for holder, name in ((Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
        setattr(holder, name, _slowly(getattr(holder, name)))
    store = CheckpointStore(folder, keep=2)
    store.recover()
    saved.send(0)
    while True:
        _save(store, step)
        saved.send(step)
        # A resumed run repeats steps: save some a second time.
        step += random.choice((0, 1, 1))


def test_kill_minus_nine_at_any_moment_leaves_the_latest_finished_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=2)
    chance = random.Random(0)
    finished = unfinished = kills = 0
    # So many kills as it takes: a busy machine finishes few saves before each.
    while kills < 25 or finished <= 10 or unfinished <= 10:
        kills += 1
        assert kills <= 150, f"{finished} saves finished and {unfinished} did not"
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_save_for_ever, args=(folder, finished + 1, sender), daemon=True
        )
        process.start()
        sender.close()
        assert receiver.recv() == 0
        time.sleep(chance.uniform(0.02, 0.25))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                finished = max(finished, receiver.recv())
        unfinished += any(".tmp-" in path.name or ".replaced" in path.name for path in folder.glob("*"))
        store.recover()
        assert not any(".tmp-" in path.name or ".replaced" in path.name for path in folder.glob("*"))
        if finished:
            # One more may have been published before it could be reported.
            latest = _is_whole(store)
            assert finished <= latest <= finished + 1
            finished = latest


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.mark.parametrize("survived", range(4))
def test_a_step_saved_a_second_time_is_there_whichever_rename_the_kill_comes_before(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    _save(store, 1)
    _save(store, 2)
    renames = 0
    rename = Path.rename

    def counted(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames > survived:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    with contextlib.suppress(Killed):
        _save(store, 2)
    assert renames == min(survived + 1, 3)
    monkeypatch.undo()
    store.recover()
    assert _is_whole(store) == 2
    assert len(list(store.folder.iterdir())) == 2


def test_reading_a_run_that_is_being_written_disturbs_nothing(store: CheckpointStore) -> None:
    _save(store, 1)
    busy = store.folder / "step-00000002.tmp-1-00"
    busy.mkdir()
    assert CheckpointStore(store.folder, keep=1).latest_good().step == 1  # type: ignore[union-attr]
    assert busy.exists()


def test_the_manifest_tells_names_dtypes_and_shapes_without_opening_a_tensor_file(store: CheckpointStore) -> None:
    manifest = json.loads((_save(store, 4) / "manifest.json").read_bytes())
    assert manifest["step"] == 4
    assert manifest["files"]["policy-00000-00000.safetensors"]["tensors"] == {
        "layer.weight": ["F32", [7, 5]],
        "layer.bias": ["BF16", [5]],
    }
    assert np.all([entry["bytes"] > 0 for entry in manifest["files"].values()])
