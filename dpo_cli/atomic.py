"""Files that are either whole or absent, whatever moment the process is killed at.

A file is written under a temporary name in its own folder, synced, renamed, and the folder synced: a rename inside
one folder is atomic on local disks and on NFS, and without the folder's sync a power cut may undo it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 32 << 20
# There is no way to read it but to set it; here no other thread is running yet.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
_TEMPORARY_MARK = ".tmp-"


def temporary_beside(path: Path) -> Path:
    """A fresh name in the same folder; unique among processes and machines that share the folder."""
    return path.with_name(f"{path.name}{_TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}")


def is_temporary(path: Path) -> bool:
    """Whether a name was made by `temporary_beside`: something that a kill left behind, or that is being written."""
    return _TEMPORARY_MARK in path.name


def sync_file(path: Path) -> None:
    """Make a file that was just written outlive a power cut, and readable to whom the user's umask lets read.

    Some libraries (safetensors) leave their files to the owner alone, whatever the umask.
    """
    path.chmod(0o666 & ~_UMASK)
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on any exception it is removed."""
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), indented and key-sorted, so that two folders can be compared with `diff`."""
    with replacing(path) as temporary:
        temporary.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The one byte form of a JSON value: equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def content_hash(path: Path) -> str:
    """32 hex digits over a file's content: BLAKE2b of the BLAKE2b of its 32 MiB chunks.

    A tree, because hashing releases the interpreter's lock: 16 cores read a 15 GB file at the disk's speed instead of
    one core's 0.9 GB/s.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def chunk_hash(start: int) -> bytes:
            return hashlib.blake2b(_read_fully(file.fileno(), start)).digest()

        starts = range(0, size, _CHUNK_BYTES)
        if len(starts) <= 1:
            digests = [chunk_hash(start) for start in starts]
        else:
            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                digests = list(pool.map(chunk_hash, starts))
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _read_fully(descriptor: int, start: int) -> bytes:
    """One chunk; a single pread may return less than asked for on a network file system."""
    parts, wanted = [], _CHUNK_BYTES
    while wanted:
        part = os.pread(descriptor, wanted, start)
        if not part:
            break
        parts.append(part)
        start, wanted = start + len(part), wanted - len(part)
    return b"".join(parts)
