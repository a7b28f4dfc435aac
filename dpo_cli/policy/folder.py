"""Find a model on this machine or on the hub, and make sure its weight files are whole before anything is loaded."""

from __future__ import annotations

import errno
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path

from dpo_cli.errors import DpoError, ModelError
from dpo_cli.paths import resolve_path

# What a model needs and nothing else: original-format duplicates and pickles can double a download.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates/*")
HUB_LEFT_OUT = ("original/*", "consolidated*", "onnx/*", "gguf/*", "coreml/*", "openvino/*", "metal/*")
REMOTE_CODE_FILES = ("*.py",)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The header of any real model is below this; a larger number means the file is not safetensors at all.
_MAX_HEADER_BYTES = 100_000_000


def resolve_model_folder(path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model or adapter: a folder as it stands, a packaged one, or a hub name.

    Raises ModelError when there is no such folder and the hub cannot supply it (missing, gated, no connection).
    """
    local = Path(resolve_path(path)).expanduser()
    if local.is_dir():
        return local.resolve()
    if local.is_file():
        raise ModelError("A model is a folder, and this is a file.", where=str(local), hint=f"name {local.parent}")
    # One slash at most, and no path prefix: anything else can only have been meant as a folder.
    if not _HUB_NAME.fullmatch(path):
        raise _no_folder(path)
    return _download(path, revision, HUB_FILES + (REMOTE_CODE_FILES if trust_remote_code else ()))


def resolve_config_folder(path: str, revision: str | None = None) -> Path:
    """As `resolve_model_folder`, but of a hub model nothing is fetched beside its config.json."""
    local = Path(resolve_path(path)).expanduser()
    if local.exists() or not _HUB_NAME.fullmatch(path):
        return resolve_model_folder(path, revision)
    return _download(path, revision, (_CONFIG,))


def resolve_tokenizer_folder(path: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """As `resolve_model_folder`, but of a hub model no weights are fetched."""
    local = Path(resolve_path(path)).expanduser()
    if local.exists() or not _HUB_NAME.fullmatch(path):
        return resolve_model_folder(path, revision, trust_remote_code=trust_remote_code)
    small = tuple(pattern for pattern in HUB_FILES if pattern != "*.safetensors")
    return _download(path, revision, small + (REMOTE_CODE_FILES if trust_remote_code else ()))


def _no_folder(path: str) -> ModelError:
    return ModelError(f"There is no model folder {path}.", hint="check the path, or give a hub name such as org/model")


def _download(name: str, revision: str | None, files: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def fetch(*, cached_only: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=cached_only,
                allow_patterns=list(files),
                ignore_patterns=list(HUB_LEFT_OUT),
            )
        )

    # Causes are dropped (`from None`) on purpose: HTTP errors of the hub carry request headers and signed addresses.
    try:
        return fetch(cached_only=False)
    except GatedRepoError:
        raise ModelError(
            f"The model {name} is gated: its owner asks you to accept terms first.",
            hint=f"accept them at https://huggingface.co/{name}, then log in with `hf auth login`",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"The hub's model {name} has no revision {revision!r}.", hint="check model.revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"There is neither a folder {name} here nor a model of that name on the hub that you may read.",
            hint="check the spelling; for a private model, log in with `hf auth login`",
        ) from None
    except HFValidationError:
        raise _no_folder(name) from None
    except DpoError:
        raise  # a signal that came while the hub was at work
    except Exception as error:  # the hub library's HTTP client, and so its errors, differ between versions
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise ModelError(
                f"The model {name} cannot be stored: {error.strerror}.",
                where=error.filename,
                hint="free some space, or set HF_HOME to a folder on another disk",
            ) from None
        try:
            return fetch(cached_only=True)
        except (LocalEntryNotFoundError, OSError):
            raise ModelError(
                f"There is no folder {name} here, and the hub could not be reached for it ({type(error).__name__}).",
                hint="check the path or the connection, or fetch the model on another machine and give its folder",
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a model's weights are read from, in name order.

    Raises ModelError when there are none, a shard named by the index is absent, or only pickles are at hand.
    """
    if (folder / _WEIGHTS_INDEX).is_file():
        return [_existing_shard(folder, name) for name in sorted(set(_weight_map(folder / _WEIGHTS_INDEX).values()))]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError(
            "This folder holds an adapter, not a whole model.",
            where=str(folder),
            hint="model.path=<its base model> model.adapter=<this folder>",
        )
    raise _no_safetensors(folder, wanted=_WEIGHTS)


def adapter_weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a peft adapter, as a list. Raises ModelError when it is absent or pickled."""
    if not (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError(f"This folder is not a peft adapter: it has no {_ADAPTER_CONFIG}.", where=str(folder))
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise _no_safetensors(folder, wanted=_ADAPTER_WEIGHTS)
    return [folder / _ADAPTER_WEIGHTS]


def _no_safetensors(folder: Path, *, wanted: str) -> ModelError:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return ModelError(
            f"The weights are only there as pickles ({pickles[0]}), which can run code when they are opened.",
            where=str(folder),
            hint="convert them once: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
        )
    return ModelError(f"This folder has no {wanted}.", where=str(folder), hint="is it a Hugging Face model folder?")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The index of the weight files cannot be read: {error}.", where=str(index)) from error


def _existing_shard(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ModelError(f"The weight file {name} is missing.", where=str(folder), hint="copy or download it again")
    return folder / name


def check_safetensors_file(file: Path) -> None:
    """Compare a safetensors file's length with what its header promises; reads the header only.

    Raises ModelError for a truncated file and for one that is not safetensors.
    """
    size = file.stat().st_size
    again = "copy or download this file again"
    with file.open("rb") as opened:
        prefix = opened.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            # A Git LFS pointer starts with the word "version", which reads as an absurd header length.
            pointer = prefix == b"version " or prefix[:7] == b"version"
            what = "is a Git LFS pointer, not the weights themselves" if pointer else "is cut off or not safetensors"
            raise ModelError(f"The weight file {what}.", where=str(file), hint="git lfs pull" if pointer else again)
        try:
            header = json.loads(opened.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ModelError("The weight file's header is damaged.", where=str(file), hint=again) from error
    promised = 8 + header_bytes + max(ends, default=0)
    if size != promised:
        raise ModelError(
            f"The weight file has {size:,} bytes where its header promises {promised:,}: it was cut off or damaged.",
            where=str(file),
            hint=again,
        )
