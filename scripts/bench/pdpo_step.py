"""A step of PDPO beside one of DPO, on the embedded example: `python scripts/bench/pdpo_step.py`.

    python scripts/bench/pdpo_step.py --write     the table goes into docs/performance.md; some minutes
    python scripts/bench/pdpo_step.py --quick     that it runs, in a minute; its figures mean nothing

Whole runs in processes of their own, side by side, which take their steps by turns: 32 pairs a step and, for PDPO, 8
prompts with a sample each. The first steps warm up and are not timed, nor are start, evaluation and saving.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from bench_report import (
    Run,
    machine_line,
    measure_by_turns,
    parser_of,
    publish,
    ratio,
    run_in_turns,
    spread,
    table_of,
)

SIDES = {
    "DPO": ("loss=dpo",),
    "PDPO, gamma 0": ("loss=pdpo", "loss.gamma=0", "data.generator_fraction=0.2"),
    "PDPO": ("loss=pdpo", "data.generator_fraction=0.2", "rollout.prompts_per_step=8"),
}
LOG_EVERY = 10


def measure(*, steps: int, store: Path, threads: int) -> Run:
    """Every side's run."""
    with tempfile.TemporaryDirectory() as folder:
        more = (
            "data.eval=null", "eval.task.problems=null", "logger=[]", f"max_steps={steps}", f"log_every={LOG_EVERY}",
            "eval_every=0", "save_every=0", f"store_dir={store}",
        )  # fmt: skip
        sides = {side: (*words, *more, f"run_dir={folder}/{at}") for at, (side, words) in enumerate(SIDES.items())}
        return run_in_turns("timed_run.py", sides, threads=threads)


def table(repeats: Sequence[Run]) -> str:
    """The ratios are medians over the repeats, of each side's median step, as the clock is disturbed by others."""
    rows = []
    dpo = [_medians(repeat["DPO"]) for repeat in repeats]
    for side in SIDES:
        runs = [repeat[side] for repeat in repeats]
        seconds, cpu = zip(*map(_medians, runs), strict=True)
        dpo_seconds, dpo_cpu = zip(*dpo, strict=True)
        sampling = [100 * statistics.median(_sampling(run)) for run in runs]
        tokens = [statistics.mean(row.get("generator/length", 0.0) for row in run["metrics"][1:]) for run in runs]
        rows.append([
            side, spread([1000 * value for value in seconds], 1), spread([1000 * value for value in cpu], 1),
            f"{ratio(seconds, dpo_seconds):.2f}", f"{ratio(cpu, dpo_cpu):.2f}", spread(sampling, 0), spread(tokens, 0),
        ])  # fmt: skip
    header = ("side", "ms a step", "CPU ms a step", "of DPO's", "of DPO's CPU", "% sampling", "tokens a sample")
    return table_of(header, rows)


def _medians(run: Run) -> tuple[float, float]:
    """Seconds and processor seconds of a step."""
    seconds, cpu = np.median(np.subtract(run["ends"], run["starts"])[LOG_EVERY:], axis=0)
    return float(seconds), float(cpu)


def _sampling(run: Run) -> list[float]:
    """Of each group of steps that was logged, the share of its time that went into sampling.

    A run counts its waiting for turns as sampling, which is what begins a step.
    """
    starts, ends = (np.array(run[name])[:, 0] for name in ("starts", "ends"))
    shares = []
    for row in run["metrics"][1:]:
        group = slice(row["step"] - LOG_EVERY, row["step"])
        waited = (starts[group] - ends[group.start - 1 : group.stop - 1]).sum()
        worked = (ends[group] - starts[group]).sum()
        sampled = row.get("perf/sampling_pct", 0.0) / 100 * (waited + worked)
        shares.append(max(sampled - waited, 0.0) / worked)
    return shares


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of a run; at least 20")
    options = parser.parse_args()
    steps = 2 * LOG_EVERY if options.quick else options.steps
    with tempfile.TemporaryDirectory() as store:
        run = partial(measure, steps=steps, store=Path(store), threads=options.threads)
        results = measure_by_turns({"example": {"all": run}}, options)
    machine = machine_line(options.threads, "torch", "transformers")
    publish("pdpo_step.py", f"{machine}.\n\n{table(results['example']['all'])}", write=options.write)


if __name__ == "__main__":
    main()
