"""What devices a plan is made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.forecast.machine import Machine, find_machine
from dpo_cli.forecast.memory import GIB


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a driver's tool that answers like this where it is looked for."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_smallest_gpu_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "printf '81920\\n40960\\n'")
    assert find_machine("auto", device_memory_gb=None) == Machine(on_gpu=True, device_bytes=40 * GIB, devices=2)


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", ":"])
def test_a_driver_without_a_gpu_is_a_cpu(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, script)
    machine = find_machine("auto", device_memory_gb=None)
    assert not machine.on_gpu
    assert machine.device_bytes is not None


def test_hidden_gpus_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "echo 81920")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not find_machine("auto", device_memory_gb=None).on_gpu


def test_stated_memory_is_a_gpu_that_need_not_be_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path, monkeypatch, "exit 9")
    assert find_machine("auto", device_memory_gb=80) == Machine(on_gpu=True, device_bytes=80 * GIB)
    assert find_machine("cpu", device_memory_gb=16) == Machine(on_gpu=False, device_bytes=16 * GIB)
    assert find_machine("cuda", device_memory_gb=None) == Machine(on_gpu=True, device_bytes=None)
