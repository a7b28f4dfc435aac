"""What is set on a CPU before anything is computed."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch

from dpo_cli.train.device import spare_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told what to keep")
def test_memory_of_freed_tensors_is_used_again() -> None:
    def pages_zeroed() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(6 * 2**20) for _ in range(3)]  # 72 MiB, 18,432 pages
        tensors.clear()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    spare_memory()
    # What is left over at a tensor's end may be taken before the tensor is gone; then its place is not large enough.
    assert min(pages_zeroed() for _ in range(30)) < 1000


_ROWS_OF_MANY_LENGTHS = """
import torch
from dpo_cli.train.device import spare_memory
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
spare_memory()
weight = torch.randn(512, 256, dtype=torch.bfloat16)
for length in range(500, 700):
    torch.randn(length, 256, dtype=torch.bfloat16) @ weight.T
    if length == 520:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_kernels_for_rows_of_many_lengths_do_not_pile_up() -> None:
    told = subprocess.run(
        [sys.executable, "-c", _ROWS_OF_MANY_LENGTHS], check=True, capture_output=True, text=True, timeout=300
    )
    # 180 more kernels take 100 MiB and more.
    assert float(told.stdout) < 40
