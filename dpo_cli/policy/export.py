"""Write the trained policy as a Hugging Face folder, complete and checked, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_cli.atomic import sync_file, sync_folder, temporary_beside, write_json
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.folder import check_safetensors_file, weight_files
from dpo_cli.policy.load import LoadedModel, quiet_loading
from dpo_cli.policy.whole_weights import Gathered, whole_already, whole_state_dict

ADAPTER_FOLDER = "adapter"
# Of one weight file.
SHARD_SIZE = "5GB"


class FinalState(NamedTuple):
    """What is exported, on the CPU: the whole model with LoRA merged in, or None, and the adapter, if there is one."""

    weights: dict[str, Tensor] | None
    adapter: dict[str, Tensor] | None


def final_state(loaded: LoadedModel, gathered: Gathered = whole_already, *, merge: bool = True) -> FinalState:
    """Read the trained weights, one at a time; all ranks of a partitioned model call this together.

    merge: LoRA into the weights; False leaves the adapter alone.
    """
    if loaded.lora is None:
        return FinalState(whole_state_dict(loaded.model, gathered), None)
    from dpo_cli.policy.lora import adapter_state_dict, merged_state_dict

    merged = merged_state_dict(loaded.model, gathered) if merge else None
    return FinalState(merged, adapter_state_dict(loaded.model, gathered))


def in_dtype(state: FinalState, dtype: torch.dtype) -> FinalState:
    """The whole model in another dtype; tied weights stay one tensor. An adapter keeps its own, which is small."""
    if state.weights is None:
        return state
    cast = {id(tensor): tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in state.weights.values()}
    return FinalState({name: cast[id(tensor)] for name, tensor in state.weights.items()}, state.adapter)


def export_final(
    loaded: LoadedModel,
    folder: Path,
    *,
    card: str,
    notes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    state: FinalState | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write weights, config, tokenizer, generation config and model card to `folder`, which must not exist yet.

    notes: further JSON files to lay beside them, by name. state: what `final_state` gave, in the dtype of `loaded`.
    max_shard_size: of one weight file.
    Where LoRA is merged, the adapter alone lies in `folder`/adapter; else it is all of `folder`'s weights.
    Everything is written under a temporary name, read back and compared, synced, and only then renamed.
    Raises CheckpointError when the folder exists, cannot be written, or does not read back as it was.
    """
    if folder.exists():
        raise CheckpointError("The folder for the final model exists already.", where=str(folder), hint="move it away")
    state = state or final_state(loaded)
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir(parents=True)
        _write(loaded, state, temporary, card, max_shard_size)
        for name, note in notes.items():
            write_json(temporary / name, dict(note))
        _verify(loaded, state, temporary)
        _sync(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The final model cannot be written: {error}",
            where=str(folder),
            hint="once there is room, resume= the run folder: it is written from the last checkpoint",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(loaded: LoadedModel, state: FinalState, folder: Path, card: str, max_shard_size: str) -> None:
    with quiet_loading():
        # Never model.save_pretrained(folder) alone: with adapters injected it would write their module names.
        # It takes tied weights out of the dictionary it is given.
        if state.weights is not None:
            loaded.model.save_pretrained(folder, state_dict=dict(state.weights), max_shard_size=max_shard_size)
            _write_config(loaded, folder / "config.json")
        _save_tokenizer(loaded, folder)
    if loaded.lora is not None and state.adapter is not None:
        adapter = _adapter_folder(state, folder)
        adapter.mkdir(exist_ok=True)
        loaded.lora.save_pretrained(str(adapter))
        save_file(state.adapter, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(card, encoding="utf-8")


def _adapter_folder(state: FinalState, folder: Path) -> Path:
    return folder if state.weights is None else folder / ADAPTER_FOLDER


def _save_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    try:
        loaded.tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library reports a full disk as a bare Exception.
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def _write_config(loaded: LoadedModel, file: Path) -> None:
    """Undo what was set for training only: dropout of zero, our attention. The dtype is that of the weights."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.update(loaded.noise_settings)
    config["dtype"] = loaded.dtype_name
    for ours in ("attn_implementation", "_attn_implementation"):
        config.pop(ours, None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verify(loaded: LoadedModel, state: FinalState, folder: Path) -> None:
    """Open the folder as any user would and compare every tensor with the one in memory, bit for bit."""
    if state.adapter is not None:
        _verify_adapter(state.adapter, _adapter_folder(state, folder) / "adapter_model.safetensors")
    if state.weights is None:
        return
    for file in weight_files(folder):
        check_safetensors_file(file)
    with quiet_loading():
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=loaded.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=type(loaded.model).is_remote_code(),
        )
    reopened, report = opened
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise CheckpointError(f"The final model reads back with {kind}: {sorted(map(str, report[kind]))[:3]}.")
    wanted, found = digests(state.weights), digests(reopened.state_dict())
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{len(differing)} tensors of the final model read back differently, first {differing[0]}.",
            where=str(folder),
            hint="the disk may be full or failing",
        )


def _verify_adapter(adapter: Mapping[str, Tensor], file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        found = digests({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    if found != digests(adapter):
        raise CheckpointError("The adapter reads back differently.", where=str(file))


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of dtype, shape and bytes of every tensor, by name."""
    result = {}
    for name, tensor in state.items():
        raw = tensor.detach().contiguous().cpu()
        digest = hashlib.sha256(f"{raw.dtype} {tuple(raw.shape)} ".encode())
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
        result[name] = digest.hexdigest()
    return result


def _sync(folder: Path) -> None:
    for entry in (*folder.rglob("*"), folder):
        sync_folder(entry) if entry.is_dir() else sync_file(entry)
