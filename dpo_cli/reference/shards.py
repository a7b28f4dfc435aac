"""One shard: an immutable Arrow file of log-probs whose name holds the hash of its content.

    00001763712345678901234-8812-5f3a90c1-<32 hex digits of content>.arrow
    ^ nanoseconds           ^ pid ^ random

The time comes first, so that sorting names sorts by age and an older entry is never superseded by a newer one. The
content's hash in the name needs no second file that could be lost or torn.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpo_cli.atomic import content_hash, sync_file, sync_folder, temporary_beside
from dpo_cli.reference.keys import KEY_BYTES, KEY_DTYPE, KeyArray

SUFFIX = ".arrow"
Logps = NDArray[np.floating]


def write_shard(folder: Path, keys: Sequence[bytes], logps: Sequence[Logps]) -> Path:
    """Write entries as a new shard: temporary name, sync, rename, sync. Returns its path.

    logps: per-token arrays in nats, float32, or float64 for models that compute in it.
    Raises OSError (a full disk, a read-only folder), leaving nothing behind.
    """
    wide = any(array.dtype == np.float64 for array in logps)
    value_type = np.dtype(np.float64 if wide else np.float32)
    offsets = np.zeros(len(logps) + 1, dtype=np.int64)
    np.cumsum([len(array) for array in logps], out=offsets[1:])
    values = np.concatenate(logps).astype(value_type, copy=False)
    table = pa.table(
        {
            "key": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(KEY_BYTES), len(keys), [None, pa.py_buffer(b"".join(keys))]
            ),
            "logps": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values)),
        }
    )
    stem = folder / f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = temporary_beside(stem)
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        sync_file(temporary)
        path = stem.with_name(f"{stem.name}-{content_hash(temporary)}{SUFFIX}")
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    return path


def is_whole(path: Path) -> bool:
    """Whether a shard's content still has the hash in its name."""
    return content_hash(path) == path.name.removesuffix(SUFFIX).rpartition("-")[2]


class Shard:
    """A memory-mapped shard. Cheap to open; nothing is read until it is asked for."""

    def __init__(self, path: Path) -> None:
        self._batch = pa.ipc.open_file(pa.memory_map(str(path), "r")).get_batch(0)

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def keys(self) -> KeyArray:
        """(rows,) copied out of the map."""
        column = self._batch.column("key")
        return np.frombuffer(column.buffers()[1], dtype=KEY_DTYPE, count=len(column)).copy()

    def logps(self, rows: NDArray[np.int32]) -> list[Logps]:
        """Per-token arrays of some rows, copied out of the map."""
        column = self._batch.column("logps")
        # Arrow's own to_numpy imports pandas, a third of a second at every start.
        offsets: NDArray[Any] = np.from_dlpack(column.offsets)
        values: NDArray[Any] = np.from_dlpack(column.values)
        return [values[offsets[row] : offsets[row + 1]].copy() for row in rows]
