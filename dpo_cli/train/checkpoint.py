"""Checkpoints that are whole or absent: tensors as safetensors by name, everything else as JSON, nothing pickled.

    checkpoints/step-00000050/
        policy-00000-00000.safetensors  optimizer-...  rng-...     group, rank that wrote it, part of a bounded size
        state.json          schedule, position, versions
        manifest.json       written last: size, hash, tensor names, dtypes and shapes of every file

A checkpoint is written into a folder of a temporary name, synced, read back and compared with memory, described in the
manifest, and renamed. Reading verifies every byte against the manifest and falls back to the one before. Ranks write
and verify their shares in parallel into one folder, which they all must see; whole tensors by name make what any
number of them wrote readable by any other number.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_cli.atomic import is_temporary, json_bytes, sync_file, sync_folder, temporary_beside
from dpo_cli.engine.interface import SavedTensor
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import CheckpointError
from dpo_cli.train.manifest import MANIFEST, STATE, TENSORS, describe, manifest, problem_with

# A part of a checkpoint is held in memory while it is written.
PART_BYTES = 2 * 2**30

T = TypeVar("T")

_STEP_NAME = re.compile(r"step-(\d{8,})")
_REPLACED_MARK = ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk, after `step` optimiser steps; `state` is what was saved beside the tensors."""

    step: int
    folder: Path
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, of which the newest `keep` are kept.

    notify: gets one sentence for each damaged checkpoint that is passed over.
    Opening reads and changes nothing; a process that will write calls `recover` first. With several ranks every method
    is called by all of them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        ranks: Ranks | None = None,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self._ranks: Ranks = ranks or SoleRank()
        self._notify = notify

    def recover(self) -> None:
        """Clear away what a killed process left: unfinished folders, and a replacement that was not completed."""
        if self._ranks.is_main and self.folder.exists():
            self._recover()
        self._ranks.barrier()

    def _recover(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if is_temporary(path):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(_REPLACED_MARK):
                original = path.with_name(path.name.removesuffix(_REPLACED_MARK))
                if original.exists():
                    _remove(path)
                else:
                    path.rename(original)

    def check_room(self, needed: int) -> None:
        """Raise CheckpointError where not even one checkpoint of so many bytes would fit, before a run has begun.

        Tells where there is room for one and not for all that are to be kept: the save that finds none stops the run.
        """
        if not self._ranks.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        free = _free_bytes(self.folder)
        # The oldest goes only after the newest was verified.
        wanted = (self.keep + 1) * needed
        if needed > free:
            raise CheckpointError(
                f"a checkpoint takes {_readable(needed)}, and the disk has {_readable(free)} free.",
                where=str(self.folder),
                hint="run_dir= on a larger disk, or free some space",
            )
        if wanted > free:
            self._notify(
                f"note: {self.keep} checkpoints and one that is being written take {_readable(wanted)}, and the disk "
                f"has {_readable(free)} free; keep_checkpoints=1 needs the least"
            )

    def save(self, step: int, tensors: Iterable[SavedTensor], state: Mapping[str, Any], *, needed: int = 0) -> Path:
        """Write, verify and publish a checkpoint, then prune older ones. Returns its folder.

        tensors: this rank's share, on any device; consumed to its end even when the disk is full, as other ranks may
        be needed to make them and are not to wait in vain. state: JSON-able, the main rank's counts. needed: bytes.
        Raises CheckpointError on every rank when the disk of any is full or returns other bytes than were written;
        nothing of the failed checkpoint remains then and every earlier one does.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self._ranks.broadcast(temporary_beside(final))
        try:
            self._together(lambda: self._begin(temporary, needed), main_only=True)
            share = self._together(lambda: _write_share(temporary, tensors, self._ranks.rank))
            files = {name: told for part in self._ranks.gather(share or {}) for name, told in part.items()}
            self._together(lambda: self._finish(temporary, final, step, files, state), main_only=True)
        except (OSError, SafetensorError) as error:
            self._discard(temporary)
            raise self._failed(step, needed, error) from error
        except BaseException:
            self._discard(temporary)
            raise
        return final

    def latest_good(self, *, step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint, or that of `step`, of which every byte is as it was written; None if there is none."""
        for number, folder in reversed(self._ranks.broadcast(self._published())):
            if step not in (None, number):
                continue
            found = problem_with(folder, number, rank=self._ranks.rank, ranks=self._ranks.size)
            problem = next((told for told in self._ranks.gather(found) if told is not None), None)
            if problem is None:
                return Checkpoint(number, folder, json.loads((folder / STATE).read_bytes()))
            self._notify(f"checkpoint {folder} is damaged ({problem}); trying the one before it")
        return None

    def load(self, checkpoint: Checkpoint) -> dict[str, Mapping[str, Tensor]]:
        """Its tensors by group and name, read to the CPU when they are asked for. Raises CheckpointError."""
        places: dict[str, dict[str, Path]] = {}
        try:
            for path in sorted(checkpoint.folder.glob(f"*{TENSORS}")):
                with safe_open(path, framework="pt") as file:
                    group = places.setdefault(path.name.split("-", 1)[0], {})
                    group.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise _unreadable(checkpoint.folder, error) from error
        return {group: _StoredTensors(names) for group, names in places.items()}

    def _together(self, work: Callable[[], T], *, main_only: bool = False) -> T | None:
        """Do `work` on every rank, or on the main one; where it fails on any, raise its error on all."""
        value, failure = None, None
        try:
            if self._ranks.is_main or not main_only:
                value = work()
        except (OSError, SafetensorError) as error:
            failure = error
        told = self._ranks.gather(None if failure is None else (getattr(failure, "errno", None), str(failure)))
        if failure is not None:
            raise failure
        for rank, problem in enumerate(told):
            if problem is not None:
                raise OSError(problem[0], f"{problem[1]}, on rank {rank}")
        return value

    def _begin(self, temporary: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if needed > _free_bytes(self.folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary.mkdir()

    def _finish(self, temporary: Path, final: Path, step: int, files: dict[str, Any], state: Mapping[str, Any]) -> None:
        # A metric may be NaN and still be resumed; only this tool reads the file.
        _write_synced(temporary / STATE, json.dumps(dict(state), indent=2).encode())
        files |= describe(temporary, [STATE])
        _write_synced(temporary / MANIFEST, json_bytes(manifest(step, files)))
        sync_folder(temporary)
        self._publish(temporary, final)
        self._prune(newest=step)

    def _discard(self, temporary: Path) -> None:
        if self._ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Rename into place. A resumed run may save a step a second time; the first stays until the second is there."""
        replaced = final.with_name(final.name + _REPLACED_MARK)
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_folder(self.folder)
        if replaced.exists():
            _remove(replaced)

    def _prune(self, *, newest: int) -> None:
        """Remove all but the `keep` newest checkpoints up to the one just verified.

        Later ones than that can only be damaged ones that a resume passed over; they are replaced when the run gets
        there, and must not push good ones out before.
        """
        older = [folder for step, folder in self._published() if step <= newest]
        for folder in older[: -self.keep]:
            _remove(folder)

    def _published(self) -> list[tuple[int, Path]]:
        if not self.folder.exists():
            return []
        named = ((_STEP_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in named if match)

    def _failed(self, step: int, needed: int, error: Exception) -> CheckpointError:
        free = _free_bytes(self.folder) if self.folder.exists() else 0
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "the disk is full" if full else str(error)
        return CheckpointError(
            f"the checkpoint of step {step} cannot be written: {reason} "
            f"({_readable(needed)} needed, {_readable(free)} free). Earlier checkpoints are kept.",
            where=str(self.folder),
            hint="free some space, then resume= the run folder; keep_checkpoints=1 needs the least room",
        )


class _StoredTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name; each is read when it is asked for, so that a large model fits through."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _write_share(folder: Path, tensors: Iterable[SavedTensor], rank: int) -> dict[str, Any]:
    """Write a rank's tensors in files of bounded size; returns their entries of the manifest."""
    files: dict[str, Any] = {}
    waiting: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}

    def flush(group: str) -> None:
        number = counts.get(group, 0)
        counts[group] = number + 1
        files.update(_write_part(folder / f"{group}-{rank:05d}-{number:05d}{TENSORS}", waiting.pop(group)))

    stream = iter(tensors)
    try:
        for group, name, tensor in stream:
            part = waiting.setdefault(group, {})
            part[name] = tensor
            if sum(held.nbytes for held in part.values()) >= PART_BYTES:
                flush(group)
        for group in list(waiting):
            flush(group)
    finally:
        for _ in stream:
            pass
    return files


def _write_part(path: Path, group: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file of tensors and prove that what the disk gives back is what memory holds."""
    tensors = _separate(group)
    save_file(tensors, path)
    sync_file(path)
    _forget_cached(path)
    with safe_open(path, framework="pt") as file:
        if sorted(file.keys()) != sorted(tensors):
            raise OSError(errno.EIO, f"{path.name} read back with other tensors than were written")
        for key, tensor in tensors.items():
            if not _same_bits(file.get_tensor(key), tensor):
                raise OSError(errno.EIO, f"{key} in {path.name} read back other than it was written")
    return describe(path.parent, [path.name])


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the checkpoint cannot be read: {error}.", where=str(path))


def _separate(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing storage with another: the format refuses views of one another."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in group.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Equality of bytes, under which NaN equals itself and 0 differs from -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync_file(path)


def _remove(folder: Path) -> None:
    """Take a checkpoint away: renamed first, so that a kill half-way does not leave one that looks damaged."""
    doomed = temporary_beside(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _forget_cached(path: Path) -> None:
    """Ask the system to drop the file from its cache, so that reading back asks the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _readable(size: int) -> str:
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
