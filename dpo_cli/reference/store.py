"""Per-token reference log-probs on disk, shared by every run that uses the same model.

A store is a folder of immutable shards. Writers only ever add files under names of their own and readers only ever map
whole ones, so there is no lock, no database and nothing that NFS lacks; a killed pass leaves what it had finished.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from dpo_cli.atomic import is_temporary, write_json
from dpo_cli.errors import StoreError
from dpo_cli.reference.identity import ModelIdentity, explain_difference
from dpo_cli.reference.keys import KEY_DTYPE, KeyArray
from dpo_cli.reference.shards import SUFFIX, Logps, Shard, is_whole, write_shard

_MANIFEST = "manifest.json"
_ABANDONED_AFTER_SECONDS = 24 * 3600.0


def open_store(store_dir: Path, identity: ModelIdentity) -> ReferenceStore:
    """The store of one model below `store_dir`, made if need be; its `why_new` tells why it is empty, if it is.

    Raises StoreError when the folder cannot be made.
    """
    reference_dir = store_dir / "reference"
    folder = reference_dir / identity.key
    why = _why_new(reference_dir, identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _MANIFEST).exists():
            write_json(folder / _MANIFEST, identity.parts)
    except OSError as error:
        # A colleague's store that this user may only read is still worth reading.
        if not folder.is_dir():
            raise _unwritable(folder, error) from error
    return ReferenceStore(folder, why_new=why)


class ReferenceStore:
    """The entries of one model. `damaged` names shards that were found broken and set aside.

    The index costs 24 bytes an entry; the log-probs stay on disk.
    """

    def __init__(self, folder: Path, *, why_new: str = "no scores yet") -> None:
        self.folder = folder
        self.why_new = why_new
        self.damaged: list[str] = []
        self._paths: list[Path] = []
        self._keys: KeyArray = np.empty(0, dtype=KEY_DTYPE)
        self._shard: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._row: NDArray[np.int32] = np.empty(0, dtype=np.int32)
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Take in shards that appeared since, from this process or another; each is verified once.

        Where two runs scored the same response at the same time, the entry of the older shard counts, for everybody.
        """
        known = {path.name for path in self._paths}
        found = sorted(path for path in self.folder.glob(f"*{SUFFIX}") if path.name not in known)
        new = [(path, keys) for path in found if (keys := self._verified_keys(path)) is not None]
        if not new:
            return
        paths = self._paths + [path for path, _ in new]
        keys = np.concatenate([self._keys, *(part for _, part in new)])
        shard = np.concatenate(
            [self._shard, *(np.full(len(part), len(self._paths) + i, np.int32) for i, (_, part) in enumerate(new))]
        )
        row = np.concatenate([self._row, *(np.arange(len(part), dtype=np.int32) for _, part in new)])
        by_age = np.empty(len(paths), dtype=np.int32)
        by_age[sorted(range(len(paths)), key=lambda number: paths[number].name)] = np.arange(len(paths))
        order = np.lexsort((row, by_age[shard], keys))
        keys, shard, row = keys[order], shard[order], row[order]
        first = np.r_[True, keys[1:] != keys[:-1]]
        self._paths, self._keys, self._shard, self._row = paths, keys[first], shard[first], row[first]

    def missing(self, keys: KeyArray) -> NDArray[np.bool_]:
        """(n,) True where a key has no entry."""
        if not len(self):
            return np.ones(len(keys), dtype=bool)
        absent: NDArray[np.bool_] = self._keys[self._position(keys)] != keys
        return absent

    def read(self, keys: KeyArray) -> list[Logps]:
        """Per-token log-probs in nats of each key, in the order asked for. Raises KeyError on a missing one."""
        if self.missing(keys).any():
            raise KeyError(f"{int(self.missing(keys).sum())} of {len(keys)} responses have no reference log-probs")
        position = self._position(keys) if len(keys) else np.empty(0, dtype=np.int64)
        entries: list[Logps] = [np.empty(0, np.float32)] * len(keys)
        # One shard at a time: a long-lived store has more shards than a process may hold files open.
        shards = self._shard[position]
        for number in np.unique(shards):
            wanted = np.flatnonzero(shards == number)
            found = Shard(self._paths[number]).logps(self._row[position[wanted]])
            for place, logps in zip(wanted, found, strict=True):
                entries[place] = logps
        return entries

    def writer(self, *, flush_seconds: float = 30.0, flush_tokens: int = 4_000_000) -> StoreWriter:
        """A context manager that collects scored batches and writes them as shards."""
        return StoreWriter(self, flush_seconds=flush_seconds, flush_tokens=flush_tokens)

    def _position(self, keys: KeyArray) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)

    def _verified_keys(self, path: Path) -> KeyArray | None:
        try:
            if is_whole(path):
                return Shard(path).keys()
            reason = "its content is not what was written"
        except FileNotFoundError:
            return None  # Another process set it aside first.
        except (OSError, ValueError) as error:
            reason = str(error)
        kept = path.with_name(path.name + ".damaged")
        with contextlib.suppress(OSError):
            path.rename(kept)
        self.damaged.append(f"{path} is damaged ({reason}); it was set aside and its responses are scored again")
        return None

    def _remove_abandoned(self) -> None:
        """Remove what killed writers left, but only when too old to belong to a writer that is alive."""
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                if is_temporary(path) and time.time() - path.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                    path.unlink()


class StoreWriter:
    """Collects whole scoring batches; writes a shard every so often, at the end, and when an exception passes.

    A batch enters the store whole or not at all: what is missing after a kill is then a set of whole batches, which
    is what makes the resumed pass cut the very same ones.
    """

    def __init__(self, store: ReferenceStore, *, flush_seconds: float, flush_tokens: int) -> None:
        self._store = store
        self._flush_seconds = flush_seconds
        self._flush_tokens = flush_tokens
        self._keys: list[bytes] = []
        self._logps: list[Logps] = []
        self._tokens = 0
        self._flushed_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self._store.refresh()

    def add(self, keys: Sequence[bytes], logps: Sequence[Logps]) -> None:
        """Add one scored batch. Raises StoreError when it is time to write and the disk refuses."""
        self._keys.extend(keys)
        self._logps.extend(logps)
        self._tokens += sum(map(len, logps))
        late = time.monotonic() - self._flushed_at >= self._flush_seconds
        if late or self._tokens >= self._flush_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one shard."""
        if self._keys:
            try:
                write_shard(self._store.folder, self._keys, self._logps)
            except OSError as error:
                self._keys, self._logps, self._tokens = [], [], 0
                raise _unwritable(self._store.folder, error) from error
        self._keys, self._logps, self._tokens = [], [], 0
        self._flushed_at = time.monotonic()


def _unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"reference log-probs cannot be written: {error.strerror or error}. What was written before is kept.",
        where=str(folder),
        hint="free some space, or give another folder with store_dir=",
    )


def _why_new(reference_dir: Path, identity: ModelIdentity) -> str:
    """Why this model has no scores, by the differing parts of the nearest model that has."""
    nearest: list[str] | None = None
    for manifest in sorted(reference_dir.glob(f"*/{_MANIFEST}")):
        if manifest.parent.name == identity.key or not any(manifest.parent.glob(f"*{SUFFIX}")):
            continue
        try:
            parts = json.loads(manifest.read_bytes())
        except (OSError, ValueError):
            continue
        if not isinstance(parts, dict):
            continue
        differences = explain_difference(identity.parts, parts)
        if differences and (nearest is None or len(differences) < len(nearest)):
            nearest = differences
    if nearest is None:
        return "no scores of any model in this store yet"
    return "no scores with this model yet; compared with the nearest one scored before, " + "; ".join(nearest)
