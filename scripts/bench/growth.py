"""How time and memory grow with rows and with length: `python scripts/bench/growth.py`.

    python scripts/bench/growth.py --largest --write     the tables go into docs/performance.md
    python scripts/bench/growth.py --quick               that it runs; its figures mean nothing

Rows: preparing the data, from JSONL to stored token ids, in one process; 1,000,000 rows with --largest only. Memory is
the process's own, files that it maps left out. Length: a training step on pairs of one length, beside TRL's fair side.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from bench_report import (
    MIB,
    Run,
    Runs,
    machine_line,
    measure_by_turns,
    parser_of,
    publish,
    ratio,
    run_fresh,
    run_watched,
    spread,
    table_of,
    values_of,
)
from data_rows import write_pairs
from step_cases import Pair, StepCase, save

ROWS = (1_000, 10_000, 100_000)
LARGEST = 1_000_000
# Prompt + response, in tokens.
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS_PER_STEP = 8192


def measure_rows(rows: int, *, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, rows)
        told = run_watched("data_sides.py", "ours", str(file), folder, threads=threads)
    if told["rows"] != rows:
        raise SystemExit(f"{told['rows']} of {rows} rows were prepared")
    return told


def case_of_length(length: int, *, tokens: int) -> tuple[StepCase, list[Pair]]:
    """Steps of about so many tokens, in pairs of one length: half prompt, half response."""
    case = StepCase(
        "response-heavy", global_pairs=max(1, tokens // (2 * length)), micro_pairs=max(1, tokens // (2 * length)),
        timed_steps=2, vocabulary=2048,
    )  # fmt: skip
    random, half = np.random.default_rng(0), length // 2

    def ids() -> list[int]:
        found: list[int] = random.integers(2, case.vocabulary, half).tolist()
        return found

    reference = -half * float(np.log(case.vocabulary))
    pairs = [Pair(ids(), ids(), ids(), reference, reference) for _ in range(case.steps * case.global_pairs)]
    return case, pairs


def measure_length(length: int, side: str, *, tokens: int, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        case, pairs = case_of_length(length, tokens=tokens)
        save(case, pairs, file)
        told = run_fresh("step_sides.py", side, str(file), threads=threads)
    steps = slice(case.warmup_steps, None)
    counted = case.timed_steps * case.global_pairs * 2 * length
    each = {name: 1e6 * sum(told[name][steps]) / counted for name in ("seconds", "cpu_seconds")}
    return {"microseconds": each["seconds"], "cpu_microseconds": each["cpu_seconds"], "peak_bytes": told["peak_bytes"]}


def rows_table(results: dict[str, Runs]) -> str:
    lines = []
    for name, runs in results.items():
        repeats, rows = runs["ours"], int(name)
        per_row = (
            [1e6 * value / rows for value in values_of(repeats, measure)] for measure in ("seconds", "cpu_seconds")
        )
        grown = [(run["tree_peak_bytes"] - run["base_bytes"]) / MIB for run in repeats]
        lines.append([
            f"{rows:,}", spread(values_of(repeats, "seconds"), 2), *(spread(values, 0) for values in per_row),
            spread([run["tree_peak_bytes"] / MIB for run in repeats], 0), spread(grown, 0),
        ])  # fmt: skip
    header = ("rows", "s", "microseconds a row", "CPU microseconds a row", "peak, MiB", "of it after imports, MiB")
    return table_of(header, lines)


def lengths_table(results: dict[str, Runs]) -> str:
    lines = []
    for name, runs in results.items():
        cells = [name]
        for side in ("ours", "fair"):
            repeats = runs[side]
            cells += [
                spread(values_of(repeats, "microseconds"), 0), spread(values_of(repeats, "cpu_microseconds"), 0),
                spread([value / MIB for value in values_of(repeats, "peak_bytes")], 0),
            ]  # fmt: skip
        compared = (values_of(runs[side], "cpu_microseconds") for side in ("fair", "ours"))
        lines.append([*cells, f"**{ratio(*compared):.2f}**"])
    measures = ("microseconds a token", "CPU microseconds", "peak, MiB")
    named = (f"{side}: {measure}" for side in ("this tool", "TRL, fair") for measure in measures)
    return table_of(("tokens a sequence", *named, "less CPU by"), lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--largest", action="store_true", help=f"{LARGEST:,} rows too")
    options = parser.parse_args()
    rows, lengths, tokens = [*ROWS, *[LARGEST] * options.largest], list(LENGTHS), TOKENS_PER_STEP
    if options.quick:
        rows, lengths, tokens = [100, 200], [16, 32], 128
    of_rows = {str(count): {"ours": partial(measure_rows, count, threads=options.threads)} for count in rows}
    of_lengths = {
        f"{length:,}": {
            side: partial(measure_length, length, side, tokens=tokens, threads=options.threads)
            for side in ("ours", "fair")
        }
        for length in lengths
    }
    results = measure_by_turns(
        {f"rows {name}": sides for name, sides in of_rows.items()}
        | {f"length {name}": sides for name, sides in of_lengths.items()},
        options,
    )
    rows_found, lengths_found = (
        {name.removeprefix(f"{what} "): runs for name, runs in results.items() if name.startswith(f"{what} ")}
        for what in ("rows", "length")
    )
    machine = machine_line(options.threads, "torch", "transformers", "trl")
    text = f"{machine}.\n\n{rows_table(rows_found)}\n{lengths_table(lengths_found)}"
    publish("growth.py", text, write=options.write)


if __name__ == "__main__":
    main()
