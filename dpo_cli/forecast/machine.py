"""The devices a run will find, asked for without torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import Literal

from dpo_cli.forecast.memory import GIB

_ASK_GPUS = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Machine:
    """on_gpu: whether devices are GPUs. device_bytes: memory of each, None where nobody knows. devices: how many."""

    on_gpu: bool
    device_bytes: float | None
    devices: int = 1


def find_machine(device: Literal["auto", "cuda", "cpu"], *, device_memory_gb: float | None) -> Machine:
    """What `device` means here. Who states a device's memory plans for a GPU, which need not be here."""
    stated = None if device_memory_gb is None else device_memory_gb * GIB
    if device == "cpu":
        return Machine(on_gpu=False, device_bytes=stated or _main_memory())
    if stated is not None:
        return Machine(on_gpu=True, device_bytes=stated)
    gpus = _gpu_memory()
    if gpus or device == "cuda":
        # The smallest decides: every device gets the same share.
        return Machine(on_gpu=True, device_bytes=min(gpus, default=None), devices=max(1, len(gpus)))
    return Machine(on_gpu=False, device_bytes=_main_memory())


def _gpu_memory() -> list[float]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    try:
        asked = subprocess.run(_ASK_GPUS, capture_output=True, text=True, check=True, timeout=_PATIENCE_SECONDS)
        return [float(line) * 2**20 for line in asked.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _main_memory() -> float | None:
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return None
