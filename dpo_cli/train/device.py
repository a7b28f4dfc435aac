"""The device a run computes on, and how repeatable its kernels are."""

from __future__ import annotations

import ctypes
import os
import platform

import torch

from dpo_cli.errors import ConfigError

# malloc.h's names of what `mallopt` sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU where there is one. DeepSpeed hears of it; on a CPU freed memory is kept from here on.

    Raises ConfigError for a GPU that was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "No GPU can be used here.",
            where="hardware.device=cuda",
            hint="hardware.device=auto takes the CPU then; nvidia-smi tells whether the driver sees the GPU",
        )
    if name == "cpu":
        keep_freed_memory()
    # Libraries that import DeepSpeed when it is installed make it look for accelerators, and talk about it.
    os.environ.setdefault("DS_ACCELERATOR", name)
    return torch.device(name)


def keep_freed_memory() -> None:
    """Have malloc keep what tensors of up to 32 MiB leave, for the next ones: every page given back is zeroed anew.

    Of a step on a CPU that is 2 to 5%; the most that a process holds stays what it was. Only glibc's malloc is told so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**25)
        mallopt(_TRIM_THRESHOLD, 2**30)


def describe(device: torch.device, ranks: int = 1) -> str:
    """One line for the screen: what it runs on, and why, where that may surprise."""
    if ranks > 1:
        return f"{ranks} ranks, each on {describe(device)}"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads (no GPU is used)"


def memory_of(device: torch.device) -> float | None:
    """Bytes that a device has in all; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError):
        return None


def make_repeatable(*, seed: int, deterministic: bool) -> None:
    """Seed torch; with `deterministic`, only kernels that give the same bits every time."""
    torch.manual_seed(seed)
    if deterministic:
        # cuBLAS reads this when its first handle is made; without it deterministic mode refuses matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def environment(device: torch.device) -> dict[str, str]:
    """What the bits of a run depend on beside its config; a resumed run compares it with what it began with."""
    from importlib.metadata import version

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "dpo-cli")},
    }
