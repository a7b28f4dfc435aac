"""Checkpoints that are whole or absent: tensors as safetensors by name, everything else as JSON, nothing pickled.

    checkpoints/step-00000050/
        policy.safetensors  optimizer.safetensors  rng.safetensors     one file a group of tensors
        state.json          schedule, position, versions
        manifest.json       written last: size, hash, tensor names, dtypes and shapes of every file

A checkpoint is written into a folder of a temporary name, synced, read back and compared with memory, described in the
manifest, and renamed. Reading verifies every byte against the manifest and falls back to the one before.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_cli.atomic import is_temporary, json_bytes, sync_file, sync_folder, temporary_beside
from dpo_cli.errors import CheckpointError
from dpo_cli.train.manifest import MANIFEST, STATE, TENSORS, describe, problem_with

TensorGroups = Mapping[str, Mapping[str, Tensor]]

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
    Opening reads and changes nothing; a process that will write calls `recover` first.
    """

    def __init__(self, folder: Path, *, keep: int, notify: Callable[[str], None] = lambda message: None) -> None:
        self.folder = folder
        self.keep = keep
        self._notify = notify

    def recover(self) -> None:
        """Clear away what a killed process left: unfinished folders, and a replacement that was not completed."""
        if not self.folder.exists():
            return
        for path in sorted(self.folder.iterdir()):
            if is_temporary(path):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(_REPLACED_MARK):
                original = path.with_name(path.name.removesuffix(_REPLACED_MARK))
                if original.exists():
                    _remove(path)
                else:
                    path.rename(original)

    def save(self, step: int, tensors: TensorGroups, state: Mapping[str, Any]) -> Path:
        """Write, verify and publish a checkpoint, then prune older ones. Returns its folder.

        tensors: by group (a file each) and name, on any device. state: JSON-able.
        Raises CheckpointError when the disk is full or returns other bytes than were written; nothing of the failed
        checkpoint remains then and every earlier one does.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = temporary_beside(final)
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if needed > _free_bytes(self.folder):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.mkdir()
            names = [_write_group(temporary, name, group) for name, group in tensors.items()]
            # A metric may be NaN and still be resumed; only this tool reads the file.
            _write_synced(temporary / STATE, json.dumps(dict(state), indent=2).encode())
            _write_synced(temporary / MANIFEST, json_bytes(describe(temporary, step, [*names, STATE])))
            sync_folder(temporary)
            self._publish(temporary, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._failed(step, needed, error) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune(newest=step)
        return final

    def latest_good(self) -> Checkpoint | None:
        """The newest checkpoint of which every byte is as it was written; None where there is none."""
        for step, folder in reversed(self._published()):
            problem = problem_with(folder, step)
            if problem is None:
                return Checkpoint(step, folder, json.loads((folder / STATE).read_bytes()))
            self._notify(f"checkpoint {folder} is damaged ({problem}); trying the one before it")
        return None

    def load(self, checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
        """Its tensors by group and name, on the CPU. Raises CheckpointError when they cannot be read."""
        try:
            return {path.stem: load_file(path) for path in sorted(checkpoint.folder.glob(f"*{TENSORS}"))}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the checkpoint cannot be read: {error}.", where=str(checkpoint.folder)) from error

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


def _write_group(folder: Path, name: str, group: Mapping[str, Tensor]) -> str:
    """Write one file of tensors and prove that what the disk gives back is what memory holds."""
    path = folder / f"{name}{TENSORS}"
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
    return path.name


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
