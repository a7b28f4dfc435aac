"""Tokenised data, kept under a name that its content decides.

The name is a hash of everything that can change a token: the files' bytes, the tokenizer with its template, and the
settings. A folder appears whole or not at all: it is written under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.data.settings import RowSettings
from dpo_cli.data.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise it with any change to how rows become tokens or how they are stored.
FORMAT_VERSION = 2
_MANIFEST = "manifest.json"
_ABANDONED_SECONDS = 24 * 3600


def content_key(
    sources: Mapping[str, Sequence[Source]],
    tokenizer: PreTrainedTokenizerBase,
    settings: RowSettings,
    *,
    held_out_fraction: float,
    store_dir: Path,
) -> str:
    import tokenizers
    import transformers

    described = {
        "format": FORMAT_VERSION,
        "versions": [tokenizers.__version__, transformers.__version__],
        "sources": {
            name: [
                [
                    source.name,
                    source.weight,
                    source.reader.identity,
                    [[file.name, file_hash(file, store_dir)] for file in source.reader.files],
                ]
                for source in listed
            ]
            for name, listed in sources.items()
        },
        "tokenizer": tokenizer_hash(tokenizer),
        "settings": {**asdict(settings), "stop_token_ids": sorted(settings.stop_token_ids)},
        "held_out_fraction": held_out_fraction,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything in a tokenizer that decides ids and rendering, not of the folder it came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {
        "class": type(tokenizer).__name__,
        "backend": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
        "chat_template": getattr(tokenizer, "chat_template", None),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "leading": tokenizer.encode("a"),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path, store_dir: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time of change, since hashing tens of gigabytes takes minutes."""
    stat = path.stat()
    state = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    note = store_dir / "data" / "hashes" / hashlib.sha256(state.encode()).hexdigest()[:32]
    try:
        remembered = note.read_text()
        if len(remembered) == 64:
            return remembered
    except OSError:
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file written a moment ago may be written again without its time changing, on clocks as coarse as two seconds.
    if time.time() - stat.st_mtime > 3:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f"{note.name}.{uuid.uuid4().hex}")
        temporary.write_text(digest)
        temporary.replace(note)
    return digest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder whose files are all as they were written, or None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        intact = all(
            (folder / name).stat().st_size == size and _checksum(folder / name) == checksum
            for name, (size, checksum) in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if intact else None


@contextmanager
def being_built(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into; when the block ends well it becomes `folder`, otherwise it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = folder.parent / f".building-{folder.name}-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    files = {path.name: (path.stat().st_size, _checksum(path)) for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({**content, "files": files}, ensure_ascii=False), encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
        return
    except OSError:
        if not folder.exists():
            raise
    # Another run was faster, or what lies there is damaged; equal names mean equal content, so keep an intact one.
    if read_manifest(folder) is None:
        aside = folder.parent / f".building-{folder.name}-damaged-{uuid.uuid4().hex[:12]}"
        folder.rename(aside)
        temporary.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def _remove_abandoned(folder: Path) -> None:
    """Clear what a killed run left behind, once no run can still be writing it."""
    for left in folder.glob(".building-*"):
        try:
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            continue
