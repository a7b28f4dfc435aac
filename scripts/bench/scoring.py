"""Scoring the reference, by this tool and by TRL's precompute: `python scripts/bench/scoring.py`.

    python scripts/bench/scoring.py --real-data DIR --write    all cases; the table goes into docs/performance.md
    python scripts/bench/scoring.py --case prompt-heavy        one case
    python scripts/bench/scoring.py --quick                    that it runs, in a minute; its figures mean nothing

The same model and pairs on all sides, as many pairs a batch; every summed log-prob must agree. A second pass then finds
everything scored: this tool in its store, TRL in its cache.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

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
    spread,
    table_of,
    values_of,
)  # fmt: skip
from step_cases import CASES, QUICK, StepCase, pairs_of, save

SIDES = {"ours": "this tool", "fair": "TRL, fair", "trl": "TRL as shipped"}
# TRL adds float32 log-probs in float32.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


def scored(case: StepCase, *, batches: int) -> StepCase:
    """So many batches, of as many pairs as TRL's default, after one that warms up."""
    return replace(case, global_pairs=8, micro_pairs=8, warmup_steps=1, timed_steps=batches)


SCORED = {
    "prompt-heavy": scored(CASES["prompt-heavy"], batches=12),
    "response-heavy": scored(CASES["response-heavy"], batches=12),
    "prompt-heavy, bfloat16": scored(CASES["prompt-heavy, bfloat16"], batches=12),
    "GSM8K": scored(CASES["GSM8K"], batches=3),
}


def check_sums(name: str, runs: Runs, *, dtype: str) -> None:
    """Raise unless every side has our log-probs."""
    for side, (*_, last) in runs.items():
        for pair, (ours, theirs) in enumerate(zip(runs["ours"][-1]["sums"], last["sums"], strict=True)):
            if not all(math.isclose(a, b, rel_tol=TOLERANCE[dtype]) for a, b in zip(ours, theirs, strict=True)):
                raise SystemExit(f"{name}, pair {pair}: {ours} here and {theirs} of {side}: not the same work")


def rows_of(name: str, case: StepCase, runs: Runs) -> list[list[str]]:
    pairs = case.timed_steps * case.global_pairs
    ours, rows = runs["ours"], []
    for side, repeats in runs.items():
        seconds, cpu, peak = (values_of(repeats, measure) for measure in ("seconds", "cpu_seconds", "peak_bytes"))
        compared = ["", "", ""]
        if side != "ours":
            ratios = (
                ratio(seconds, values_of(ours, "seconds")), ratio(cpu, values_of(ours, "cpu_seconds")),
                ratio(values_of(ours, "peak_bytes"), peak),
            )  # fmt: skip
            compared = [f"**{value:.2f}**" for value in ratios]
        rows.append([
            name if side == "ours" else "", SIDES[side], spread([pairs / value for value in seconds], 2),
            spread([value / pairs for value in cpu], 3), spread([value / MIB for value in peak], 0),
            spread(values_of(repeats, "second_pass"), 3), *compared,
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--case", choices=SCORED, nargs="*", help="which cases (default: all)")
    parser.add_argument("--side", choices=SIDES, nargs="*", default=list(SIDES))
    parser.add_argument("--real-data", type=Path, help="folder with gsm8k/ and qwen2-tokenizer/")
    options = parser.parse_args()
    cases = {name: SCORED[name] for name in options.case or SCORED}
    if options.quick:
        cases = {"quick": scored(QUICK, batches=2)}
    pairs = {name: pairs_of(case, options.real_data) for name, case in cases.items()}
    with tempfile.TemporaryDirectory() as folder:

        def side_of(name: str, side: str) -> Run:
            file = Path(folder) / f"{name}.json"
            if not file.exists():
                save(cases[name], pairs[name], file)
            return run_fresh("scoring_sides.py", side, str(file), threads=options.threads)

        results = measure_by_turns(
            {name: {side: partial(side_of, name, side) for side in options.side} for name in cases},
            options,
            check=lambda name, runs: check_sums(name, runs, dtype=cases[name].dtype),
        )
    header = (
        "case", "side", "pairs/s", "CPU s a pair", "peak, MiB", "second pass, s", "faster by", "less CPU by", "memory"
    )  # fmt: skip
    rows = [row for name, runs in results.items() for row in rows_of(name, cases[name], runs)]
    machine = machine_line(options.threads, "torch", "transformers", "trl")
    publish("scoring.py", f"{machine}.\n\n{table_of(header, rows)}", write=options.write)


if __name__ == "__main__":
    main()
