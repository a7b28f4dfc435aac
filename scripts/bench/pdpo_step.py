"""A step of PDPO beside one of DPO, on the embedded example: `python scripts/bench/pdpo_step.py`.

    python scripts/bench/pdpo_step.py --write     the table goes into docs/performance.md; some minutes
    python scripts/bench/pdpo_step.py --quick     that it runs, in a minute; its figures mean nothing

Whole runs in fresh processes, by turns: 32 pairs a step and, for PDPO, 8 prompts with a sample each. The first steps
warm up and are not timed, nor are start, evaluation and saving.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
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
)

SIDES = {
    "DPO": ("loss=dpo",),
    "PDPO, gamma 0": ("loss=pdpo", "loss.gamma=0", "data.generator_fraction=0.2"),
    "PDPO": ("loss=pdpo", "data.generator_fraction=0.2", "rollout.prompts_per_step=8"),
}
LOG_EVERY = 10


def measure(side: str, *, steps: int, store: Path, threads: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        return run_fresh(
            "timed_run.py", *SIDES[side], "data.eval=null", "eval.task.problems=null", "logger=[]",
            f"max_steps={steps}", f"log_every={LOG_EVERY}", "eval_every=0", "save_every=0", f"run_dir={folder}",
            f"store_dir={store}", threads=threads,
        )  # fmt: skip


def table(runs: Runs) -> str:
    rows = []
    dpo: list[tuple[float, float]] = []
    for side, repeats in runs.items():
        steps = [np.diff(run["ends"][LOG_EVERY - 1 :], axis=0) for run in repeats]
        # A median for the clock, which others on the machine disturb; processor time is summed.
        each = [(float(np.median(step[:, 0])), float(step[:, 1].mean())) for step in steps]
        dpo = dpo or each
        sampling = [statistics.mean(row.get("perf/sampling_pct", 0.0) for row in run["metrics"][1:]) for run in repeats]
        tokens = [statistics.mean(row.get("generator/length", 0.0) for row in run["metrics"][1:]) for run in repeats]
        seconds, cpu = zip(*each, strict=True)
        dpo_seconds, dpo_cpu = zip(*dpo, strict=True)
        rows.append([
            side, spread([1000 * value for value in seconds], 1), spread([1000 * value for value in cpu], 1),
            f"{ratio(seconds, dpo_seconds):.2f}", f"{ratio(cpu, dpo_cpu):.2f}", spread(sampling, 0), spread(tokens, 0),
        ])  # fmt: skip
    header = ("side", "ms a step", "CPU ms a step", "of DPO's", "of DPO's CPU", "% sampling", "tokens a sample")
    return table_of(header, rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of a run; at least 20")
    options = parser.parse_args()
    steps = 2 * LOG_EVERY if options.quick else options.steps
    with tempfile.TemporaryDirectory() as store:
        run = partial(measure, steps=steps, store=Path(store), threads=options.threads)
        results = measure_by_turns(
            {"example": {side: partial(run, side) for side in SIDES}},
            options,
        )
    machine = machine_line(options.threads, "torch", "transformers")
    publish("pdpo_step.py", f"{machine}.\n\n{table(results['example'])}", write=options.write)


if __name__ == "__main__":
    main()
