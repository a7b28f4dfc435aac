"""What is set on a CPU before anything is computed."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from dpo_cli.train.device import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told what to keep")
def test_memory_of_freed_tensors_is_used_again() -> None:
    def pages_zeroed() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(6 * 2**20) for _ in range(3)]  # 72 MiB, 18,432 pages
        tensors.clear()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    # What is left over at a tensor's end may be taken before the tensor is gone; then its place is not large enough.
    assert min(pages_zeroed() for _ in range(30)) < 1000
