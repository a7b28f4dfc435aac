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
        torch.ones(2**24)  # 64 MiB, 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    keep_freed_memory()
    pages_zeroed()
    assert min(pages_zeroed() for _ in range(5)) < 1000
