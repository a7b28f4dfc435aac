"""What a launcher tells its workers through the environment."""

from __future__ import annotations

import os

from dpo_cli.engine.processes import Process, this_process

# Set by `launch` alone. The mark is the same in every process of one launch, whatever its depth.
MARK = "DPO_LAUNCH"
_LAUNCHER = "DPO_LAUNCHED_BY"
_STOP_SECONDS = "DPO_STOP_SECONDS"
DEFAULT_STOP_SECONDS = 600.0


def is_worker() -> bool:
    """Whether a launcher (torchrun, deepspeed, ours) started this process as one of its ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_by() -> Process | None:
    """The dpo-train that started this process through `launch`; None under any other launcher."""
    pid, _, started = os.environ.get(_LAUNCHER, "").partition(":")
    return Process(int(pid), int(started)) if pid else None


def stop_seconds() -> float:
    """How long a rank that was asked to stop may take to save."""
    return float(os.environ.get(_STOP_SECONDS, DEFAULT_STOP_SECONDS))


def for_workers(*, mark: str, threads: int, seconds: float) -> dict[str, str]:
    """The environment of the processes that this one launches. threads: of each, unless the user has said."""
    launcher = this_process()
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        MARK: mark,
        _LAUNCHER: f"{launcher.pid}:{launcher.started}",
        _STOP_SECONDS: str(seconds),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, round(seconds))),
    }


def take_local_rank(words: list[str]) -> list[str]:
    """The command line without `--local_rank=N`, which `deepspeed` adds: it belongs into the environment."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(rest, "0"))
        else:
            kept.append(word)
    return kept
