"""What the benchmarks share: fresh processes by turns, resident memory, spreads, tables in the documents."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

MIB = 2**20
BENCH = Path(__file__).resolve().parent
DOCUMENT = BENCH.parents[1] / "docs" / "performance.md"
# When this process was asked for, in seconds of `time.time`; told to fresh processes.
_LAUNCHED = "BENCH_LAUNCHED"
_UNTIL_THREADS_SLEEP = 0.01

# What one side of one repeat tells, and the repeats of every side.
Run = dict[str, Any]
Runs = dict[str, list[Run]]


def parser_of(doc: str | None, *, repeats: int = 3) -> argparse.ArgumentParser:
    """With the arguments that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="keep all figures here, and go on from what is there")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("--quick", action="store_true", help="that it runs; its figures mean nothing")
    return parser


def environment_of(threads: int, **variables: str) -> dict[str, str]:
    """Of a measured process: so many threads, no network, no chatter."""
    quiet = {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    return os.environ | quiet | offline | {_LAUNCHED: str(time.time())} | variables


def run_fresh(script: str, *words: str, threads: int, **variables: str) -> Run:
    """A script of this folder in a process of its own; what it prints last is JSON."""
    command = [sys.executable, str(BENCH / script), *words]
    done = subprocess.run(
        command, env=environment_of(threads, **variables), text=True, stdout=subprocess.PIPE, check=True
    )
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


def run_in_turns(script: str, sides: Mapping[str, Sequence[str]], *, threads: int) -> dict[str, Run]:
    """Processes of one script at the same time, of which only one works at a time, step by step.

    What else the machine does falls on all sides alike, be it for less than a second. Before each step a process says
    "ready" and waits for a line; what it prints last is JSON.
    """
    environment = environment_of(threads)
    with ExitStack() as alive:
        processes = {}
        for side, words in sides.items():
            command = [sys.executable, str(BENCH / script), "--turns", *words]
            process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
            )
            alive.callback(process.wait)
            alive.callback(process.kill)
            processes[side] = process
        told: dict[str, Run] = {}
        waiting = {side: _next_line(process) for side, process in processes.items()}
        while waiting:
            # The other way round in the next round.
            for side in reversed(list(waiting)):
                # Until the threads of the one before, which look for more work for a while, have gone to sleep.
                time.sleep(_UNTIL_THREADS_SLEEP)
                line = waiting.pop(side)
                if line != "ready":
                    told[side] = json.loads(line)
                    continue
                stdin = processes[side].stdin
                assert stdin is not None
                stdin.write("go\n")
                waiting[side] = _next_line(processes[side])
    return {side: told[side] for side in sides}


def _next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise subprocess.CalledProcessError(process.wait(), process.args)
    return line.strip()


def run_watched(script: str, *words: str, threads: int, **variables: str) -> Run:
    """As `run_fresh`, with tree_peak_bytes: the most memory of their own that it and all processes below it had."""
    command, peak = [sys.executable, str(BENCH / script), *words], 0
    with subprocess.Popen(
        command, env=environment_of(threads, **variables), text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        while process.poll() is None:
            peak = max(peak, sum(own_bytes(pid) for pid in _tree(process.pid)))
            time.sleep(0.05)
        told = process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    found: Run = json.loads(told.splitlines()[-1])
    return found | {"tree_peak_bytes": peak}


def _tree(pid: int) -> list[int]:
    """A process and all below it; one that ends meanwhile is left out."""
    try:
        below = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="ascii").split()
        ]
    except OSError:
        return [pid]
    return [pid, *(each for child in below for each in _tree(child))]


def own_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process without files that it maps, which the system may drop; 0 of one that has ended."""
    try:
        _, resident, mapped, *_ = map(int, Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return 0
    return (resident - mapped) * os.sysconf("SC_PAGE_SIZE")


def run_command(command: str, *words: str, threads: int, **variables: str) -> str:
    """One of this tool's commands, installed beside the interpreter; returns what it printed."""
    program = str(Path(sys.executable).with_name(command))
    environment = environment_of(threads, **variables)
    done = subprocess.run([program, *words], env=environment, text=True, stdout=subprocess.PIPE, check=True)
    return done.stdout


def seconds_since_launch() -> float:
    """Since this process was asked for, interpreter and imports included."""
    return time.time() - float(os.environ[_LAUNCHED])


def measure_by_turns(
    cases: Mapping[str, Mapping[str, Callable[[], Run]]],
    options: argparse.Namespace,
    *,
    check: Callable[[str, Runs], None] = lambda name, runs: None,
) -> dict[str, Runs]:
    """Every side of every case, repeat after repeat, in an order that turns round.

    options: of `parser_of`; what their file of figures has already is not measured again.
    check: raises for a case whose sides did not do the same work.
    """
    results: dict[str, Runs] = {}
    kept: Path | None = options.json
    if kept is not None and kept.exists():
        results = json.loads(kept.read_text(encoding="utf-8"))
    for repeat in range(1 if options.quick else options.repeats):
        for name, sides in cases.items():
            runs = results.setdefault(name, {})
            # Whatever a machine does at times falls on other sides in other turns.
            for side in reversed(list(sides)) if repeat % 2 else sides:
                if len(runs.setdefault(side, [])) > repeat:
                    continue
                began = time.perf_counter()
                runs[side].append(sides[side]())
                load, seconds = os.getloadavg()[0], time.perf_counter() - began
                print(f"{name}, {side}, repeat {repeat + 1}: {seconds:.0f} s, load {load:.1f}", file=sys.stderr)
                if kept is not None:
                    kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
            check(name, runs)
    return {name: {side: results[name][side] for side in sides} for name, sides in cases.items()}


def values_of(runs: Sequence[Run], measure: str) -> list[float]:
    return [float(run[measure]) for run in runs]


def spread(values: Sequence[float], digits: int) -> str:
    """Median (lowest-highest)."""
    shown = [f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]}-{shown[2]})"


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over repeats: two sides of one repeat were measured one soon after the other."""
    return statistics.median(a / b for a, b in zip(values, others, strict=False))


def table_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]]) + "\n"


def publish(script: str, text: str, *, write: bool) -> None:
    """Show what a benchmark found; write: and put it between that script's markers in the document."""
    print(text)
    if write:
        begin, end = (f"<!-- {what}table: scripts/bench/{script} -->" for what in ("", "end of "))
        replace_between(DOCUMENT, f"{begin}\n", end, text)


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
    """The processor and how wide it computes, the threads that are used, and the versions of what was measured."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    named = (model[1].strip() if model else platform.processor() or platform.machine(), f"{os.cpu_count()} cores")
    # Processors of one name may differ in it, and matrix products follow it.
    widest = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in cpu.split()][:1]
    versions = (f"{package} {version(package)}" for package in packages)
    used = f"{threads} thread{'s' * (threads > 1)}"
    parts = (*named, *widest, used, f"Python {platform.python_version()}", *versions)
    return ", ".join(parts)


def replace_between(document: Path, begin: str, end: str, text: str) -> None:
    """Put text between two markers of a document."""
    before, rest = document.read_text(encoding="utf-8").split(begin)
    document.write_text(before + begin + text + end + rest.split(end, 1)[1], encoding="utf-8")
