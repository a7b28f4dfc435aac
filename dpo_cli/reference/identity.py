"""Which model scored: a hash of everything that changes a log-prob, and of nothing that does not.

Weights by content, the config without what only describes or trains the model, the dtype and the attention route.
Reading 140 GB at every start would cost minutes, so a file's hash is remembered for as long as the file is untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.atomic import content_hash, json_bytes, write_json
from dpo_cli.engine.ranks import Ranks
from dpo_cli.errors import ModelError

if TYPE_CHECKING:
    from dpo_cli.policy.load import LoadedModel

_FORMAT = 1
_ATTENTION_ROUTE = "attention route"
# A file changed twice within the clock's grain keeps its times; hashes of files this fresh are not remembered.
_SETTLED_SECONDS = 5.0
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# Optimiser and trainer states lie beside weights in some folders and score nothing.
_NOT_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")

# What a config says that no forward pass without dropout can see. A key not listed here is kept: a needless miss costs
# one scoring pass, a wrong hit costs the experiment.
# fmt: off
_VOLATILE = frozenset({
    "transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "use_cache", "architectures",
    "auto_map", "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_commit_hash",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict",
    "gradient_checkpointing", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id", "sep_token_id", "problem_type", "id2label", "label2id", "task_specific_params",
    "tie_encoder_decoder", "chunk_size_feed_forward", "finetuning_task", "num_labels", "tokenizer_class",
    "router_aux_loss_coef", "output_router_logits",
})
# fmt: on
_VOLATILE_ENDINGS = ("dropout", "_dropout_prob", "_pdrop")


@dataclass(frozen=True)
class ModelIdentity:
    """key: 32 hex digits, the store folder's name. parts: what went into it, kept so that a miss can be explained."""

    key: str
    parts: dict[str, Any]

    @property
    def short(self) -> str:
        return self.key[:6]

    @property
    def experiment_key(self) -> str:
        """The same whichever kernel computes the attention: a run may go on where there is another."""
        return _digest({name: part for name, part in self.parts.items() if name != _ATTENTION_ROUTE})


def identity_of(model: LoadedModel, *, store_dir: Path, ranks: Ranks) -> ModelIdentity:
    """A loaded model's identity, which all ranks ask for together: weights are hashed once, by the main rank."""
    found = model_identity(**model.identity, cache_dir=store_dir / "hashes") if ranks.is_main else None
    identity = ranks.broadcast(found)
    assert identity is not None
    return identity


def model_identity(
    folder: Path,
    *,
    adapter: Path | None,
    config: Mapping[str, Any],
    dtype: str,
    attention_route: str,
    cache_dir: Path,
) -> ModelIdentity:
    """Hash what decides a model's log-probs.

    folder: a Hugging Face model folder. adapter: a peft folder merged into it, or None. config: the loaded model's
    `config.to_dict()`. cache_dir: where file hashes are remembered; one small file each, so that no process waits for
    another.
    Raises ModelError when a folder holds no weights.
    """
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "weights": _weight_hashes(folder, cache_dir),
        "adapter": _adapter_hashes(adapter, cache_dir) if adapter is not None else {},
        "config": json.loads(json.dumps(_numeric_config(config), default=str)),
        "dtype": dtype,
        _ATTENTION_ROUTE: attention_route,
    }
    return ModelIdentity(_digest(parts), parts)


def _digest(parts: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json_bytes(parts), digest_size=16).hexdigest()


def _numeric_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without volatile keys, at every depth (multi-part models nest their text config)."""
    return {
        str(key): _numeric_config(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _VOLATILE and not str(key).endswith(_VOLATILE_ENDINGS)
    }


def _weight_hashes(folder: Path, cache_dir: Path) -> dict[str, str]:
    for pattern in _WEIGHT_PATTERNS:
        files = sorted(path for path in folder.glob(pattern) if not path.name.startswith(_NOT_WEIGHTS))
        if files:
            return {path.name: remembered_hash(path, cache_dir) for path in files}
    raise ModelError(
        "this folder holds no model weights.",
        where=str(folder),
        hint="give a folder with *.safetensors files, or a model name of the Hugging Face hub",
    )


def _adapter_hashes(adapter: Path, cache_dir: Path) -> dict[str, Any]:
    """Weights, and the settings that scale them: lora_alpha alone changes every log-prob."""
    settings = adapter / "adapter_config.json"
    try:
        config = json.loads(settings.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"this is not an adapter's folder: {error}.", where=str(settings)) from error
    kept = {
        key: value
        for key, value in _numeric_config(config).items()
        if key not in ("base_model_name_or_path", "inference_mode", "revision", "peft_version")
    }
    # peft saves target modules from a set, in an order that differs from run to run.
    kept = {key: sorted(value) if _is_names(value) else value for key, value in kept.items()}
    return {**_weight_hashes(adapter, cache_dir), "settings": kept}


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def remembered_hash(path: Path, cache_dir: Path) -> str:
    """`content_hash`, or what it was when the file last had these size, times and inode.

    The change time is part of it because `cp -p` and `rsync -t` carry an older modification time over.
    """
    real = path.resolve()
    status = real.stat()
    stamp = {
        "path": str(real),
        "bytes": status.st_size,
        "inode": status.st_ino,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }
    name = hashlib.blake2b(os.fsencode(str(real)), digest_size=16).hexdigest()
    memory = cache_dir / f"{name}.json"
    try:
        remembered = json.loads(memory.read_bytes())
        if remembered["stamp"] == stamp:
            return str(remembered["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # Never seen, or a damaged note: the file itself is the truth.
    before = time.time()
    value = content_hash(real)
    after = real.stat()
    untouched = (after.st_mtime_ns, after.st_ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)
    if untouched and before - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"stamp": stamp, "hash": value})
        except OSError:
            pass  # A read-only or full cache costs time at the next start, nothing else.
    return value


def explain_difference(wanted: Mapping[str, Any], nearest: Mapping[str, Any]) -> list[str]:
    """In words, the parts in which two models' identities differ."""
    found = []
    for part, noun in (("weights", "model weights"), ("adapter", "adapter")):
        names = _different_keys(wanted.get(part, {}), nearest.get(part, {}))
        if names:
            found.append(f"{noun} changed: {_first_of(names)}")
    here, there = wanted.get("config", {}), nearest.get("config", {})
    changes = [f"{key} {there.get(key)!r} -> {here.get(key)!r}" for key in _different_keys(here, there)]
    if changes:
        found.append(f"model config changed: {_first_of(changes)}")
    for part in ("dtype", _ATTENTION_ROUTE, "format"):
        if wanted.get(part) != nearest.get(part):
            found.append(f"{part} differs: {nearest.get(part)} -> {wanted.get(part)}")
    return found


def _different_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    missing = object()
    return sorted(key for key in {*first, *second} if first.get(key, missing) != second.get(key, missing))


def _first_of(names: list[str], shown: int = 3) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
