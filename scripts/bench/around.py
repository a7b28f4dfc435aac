"""What surrounds the steps: start, errors, saving, resuming, tokenising, ranks: `python scripts/bench/around.py`.

    python scripts/bench/around.py --write                          the tables go into docs/performance.md
    python scripts/bench/around.py --case "first step, warm"        one case
    python scripts/bench/around.py --quick                          that it runs; its figures mean nothing

First step: from the command until the first step of a whole epoch of the embedded example is done, and logged; cold is
without prepared data and reference log-probs, warm with both. TRL's side is a short script with the same folder, data
and settings, and with precomputed log-probs too, which it finds again in its cache when warm. "Imports alone" is a
process that imports torch and a model class of transformers, which both sides have to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from around_starts import Starts
from bench_report import (
    Run,
    Runs,
    machine_line,
    measure_by_turns,
    parser_of,
    publish,
    ratio,
    run_fresh,
    spread,
    table_of,
    values_of,
)  # fmt: skip
from data_rows import write_pairs
from step_cases import QUICK, StepCase, pairs_of, save

CASES = {
    "help": "< 1 s",
    "config error": "< 1.5 s",
    "imports alone": "",
    "first step, cold": "",
    "first step, warm": "at most half of TRL's",
    "first step of a resumed run": "",
    "a checkpoint": "",
    "tokenising": "",
}
RANKS = {
    "one process": ("hardware=single_gpu", "hardware.device=cpu"),
    "DeepSpeed ZeRO-1, one rank": ("hardware=deepspeed_zero1", "hardware.device=cpu", "hardware.num_workers=1"),
    "DeepSpeed ZeRO-1, two ranks": ("hardware=deepspeed_zero1", "hardware.device=cpu", "hardware.num_workers=2"),
}
# 19 million weights.
SAVED = StepCase("tiny", vocabulary=8192, hidden=512, intermediate=2048, layers=4, global_pairs=4, micro_pairs=4,
                 warmup_steps=0, timed_steps=1)  # fmt: skip
ROWS = 100_000


def measure_saving(side: str, case: StepCase, *, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        save(case, pairs_of(case, None), file)
        return run_fresh("saving_sides.py", side, str(file), threads=threads)


def measure_tokenising(side: str, rows: int, *, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, rows)
        found = run_fresh("data_sides.py", side, str(file), folder, threads=threads)
    if found["rows"] != rows:
        raise SystemExit(f"{side} kept {found['rows']} of {rows} rows")
    return found


def table(results: dict[str, Runs]) -> str:
    lines = []
    for name, runs in results.items():
        times = {side: [values_of(each, clock) for clock in ("seconds", "cpu_seconds")] for side, each in runs.items()}
        cells = [spread(values, 2) for values in times["ours"]]
        theirs = [spread(values, 2) for values in times["trl"]] if "trl" in times else ["", ""]
        compared = [f"**{ratio(a, b):.2f}**" for a, b in zip(times.get("trl", []), times["ours"], strict=False)]
        lines.append([name, *cells, *theirs, *(compared or ["", ""]), CASES[name]])
    header = ("what", "this tool, s", "CPU s", "TRL, s", "CPU s", "faster by", "less CPU by", "wanted")
    return table_of(header, lines)


def ranks_table(runs: Runs) -> str:
    base = values_of(runs["one process"], "seconds")
    lines = []
    for name, repeats in runs.items():
        seconds = values_of(repeats, "seconds")
        lines.append([name, spread([1000 * value for value in seconds], 0), f"{ratio(base, seconds):.2f}"])
    return table_of(("processes, one thread each", "ms a step", "of one process's speed"), lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--case", choices=[*CASES, "ranks"], nargs="*", default=[*CASES, "ranks"])
    options = parser.parse_args()
    saved, rows = (QUICK, 300) if options.quick else (SAVED, ROWS)
    with tempfile.TemporaryDirectory() as scratch:
        starts = Starts(Path(scratch), threads=options.threads, pairs=8 if options.quick else 32)
        cases: dict[str, dict[str, Callable[[], Run]]] = {
            "help": {"ours": starts.help},
            "config error": {"ours": starts.config_error},
            "imports alone": {"ours": starts.imports},
            "first step, cold": {"ours": starts.ours_cold, "trl": starts.trl_cold},
            "first step, warm": {"ours": starts.ours_warm, "trl": starts.trl_warm},
            "first step of a resumed run": {"ours": starts.ours_resumed, "trl": starts.trl_resumed},
            "a checkpoint": {
                side: partial(measure_saving, side, saved, threads=options.threads) for side in ("ours", "trl")
            },
            "tokenising": {
                side: partial(measure_tokenising, side, rows, threads=options.threads) for side in ("ours", "trl")
            },
            "ranks": {name: partial(starts.step_of_ranks, words) for name, words in RANKS.items()},
        }
        results = measure_by_turns(
            {name: cases[name] for name in options.case},
            options,
        )
    ranks = results.pop("ranks", None)
    text = f"{machine_line(options.threads, 'torch', 'transformers', 'trl')}.\n\n{table(results)}"
    if ranks is not None:
        text += f"\n{ranks_table(ranks)}"
    publish("around.py", text, write=options.write)


if __name__ == "__main__":
    main()
