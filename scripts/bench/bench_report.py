"""What the benchmarks share: resident memory of a process, a line on the machine, tables in the documents."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

MIB = 2**20


def resident_bytes() -> int:
    """Of this process, now."""
    return _status("VmRSS")


def forget_peak() -> None:
    """Count the peak of this process's resident memory anew from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_resident_bytes() -> int:
    """The most since `forget_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    told = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if told is None:
        raise OSError(f"/proc/self/status says nothing of {name}")
    return int(told[1]) * 1024


def machine_line(threads: int, *packages: str) -> str:
    """The processor, the threads that are used, and the versions of what was measured."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    named = (model[1].strip() if model else platform.processor() or platform.machine(), f"{os.cpu_count()} cores")
    versions = (f"{package} {version(package)}" for package in packages)
    parts = (*named, f"{threads} thread{'s' * (threads > 1)}", f"Python {platform.python_version()}", *versions)
    return ", ".join(parts)


def replace_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put text between two markers of a document."""
    before, rest = document.read_text(encoding="utf-8").split(begin)
    document.write_text(before + begin + text + end + rest.split(end, 1)[1], encoding="utf-8")
