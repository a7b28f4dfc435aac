"""Seconds to a gain in task accuracy, by this tool and by TRL: `python scripts/bench/learning.py`.

    python scripts/bench/learning.py --write     the table goes into docs/performance.md; half an hour on one thread
    python scripts/bench/learning.py --quick     that it runs, in some minutes; its figures mean nothing

`dpo-train` with the preset of the embedded example, and TRL with the same pairs in the same order, learning rates and
settings, from the command to the end of a step: start, tokenising, scoring the reference and the steps count, and so
does saving the snapshots. These are evaluated afterwards: `dpo-eval`'s greedy answers to the example's test problems.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from dataclasses import asdict
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
    run_command,
    run_fresh,
    spread,
    table_of,
)
from trl_run import TrlRun

SIDES = {"ours": "this tool", "fair": "TRL, fair", "trl": "TRL as shipped"}
# The presets of model=tiny, and of loss=dpo with it.
STEPS, PAIRS, LEARNING_RATE, BETA = 480, 32, 2e-4, 3.0
LOG_EVERY = 20
GAINS = (2, 3, 4)
EXAMPLE = Path(__file__).resolve().parents[2] / "dpo_cli" / "example"


def measure(side: str, *, steps: int, snapshots: int, problems: int, threads: int) -> Run:
    """Train from nothing, then evaluate. ends: of steps, in seconds; points: (step, right in percent)."""
    every = steps // snapshots
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        if side == "ours":
            told = run_fresh(
                "timed_run.py", "data.eval=null", "eval.task.problems=null", "logger=[]", f"max_steps={steps}",
                f"log_every={LOG_EVERY}", "eval_every=0", f"save_every={every}", f"keep_checkpoints={snapshots}",
                f"run_dir={folder}", f"store_dir={scratch}/store", threads=threads,
            )  # fmt: skip
            losses = [row["loss"] for row in told["metrics"]]
        else:
            run = TrlRun(
                model=str(EXAMPLE / "base"), data=str(EXAMPLE / "pairs.jsonl"), folder=str(folder), steps=steps,
                pairs=PAIRS, learning_rate=LEARNING_RATE, beta=BETA, fair=side == "fair", in_our_order=True,
                save_every=every,
            )  # fmt: skip
            file = Path(scratch) / "run.json"
            file.write_text(json.dumps(asdict(run)), encoding="utf-8")
            told = run_fresh("trl_run.py", str(file), threads=threads, HF_DATASETS_CACHE=f"{scratch}/cache")
            losses = np.array(told["losses"]).reshape(-1, LOG_EVERY).mean(1).tolist()
        points = []
        for step in range(every, steps + 1, every):
            model = folder / f"checkpoint-{step}"
            if side == "ours":
                model = Path(scratch) / f"step-{step}"
                run_command("dpo-export", str(folder), f"--step={step}", f"--to={model}", threads=threads)
            points.append((step, accuracy(model, problems=problems, threads=threads)))
    seconds, cpu_seconds = zip(*told["ends"], strict=True)
    return {"ends": seconds, "cpu_ends": cpu_seconds, "losses": losses, "points": points}


def accuracy(model: Path, *, problems: int, threads: int) -> float:
    """In percent."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        run_command(
            "dpo-eval", f"model.path={model}", f"prompts={EXAMPLE / 'problems.jsonl'}", f"limit={problems}",
            "sampling.max_new_tokens=48", f"out={out}", f"store_dir={folder}", threads=threads,
        )  # fmt: skip
        found = json.loads(out.read_text(encoding="utf-8"))
    return round(100 * float(found["accuracy"]["value"]), 6)


def check_losses(name: str, runs: Runs) -> None:
    """Raise unless both began alike; later a step's rounding moves the weights of the next ones."""
    for side, (*_, last) in runs.items():
        ours, theirs = runs["ours"][-1]["losses"][0], last["losses"][0]
        if not math.isclose(ours, theirs, rel_tol=1e-3):
            raise SystemExit(f"the first steps' loss is {ours} here and {theirs} of {side}: not the same work")


def seconds_to(gain: float, run: Run, *, base: float, clock: str) -> float | None:
    """When the line through the snapshots first reaches base + gain; None where it never does."""
    wanted, before = base + gain, (0, base)
    for step, reached in run["points"]:
        if reached >= wanted:
            share = (wanted - before[1]) / (reached - before[1])
            return float(np.interp(before[0] + share * (step - before[0]), range(1, len(run[clock]) + 1), run[clock]))
        before = (step, reached)
    return None


def table(runs: Runs, base: float) -> str:
    rows = []
    for side, repeats in runs.items():
        cells = [SIDES[side], spread([run["ends"][0] for run in repeats], 1)]
        for gain in GAINS:
            found = {
                name: [seconds_to(gain, run, base=base, clock="ends") for run in each]
                for name, each in (("ours", runs["ours"]), (side, repeats))
            }
            if None in found[side] or None in found["ours"]:
                cells.append("not reached")
                continue
            theirs, ours = ([value for value in found[name] if value is not None] for name in (side, "ours"))
            cells.append(spread(theirs, 0) + ("" if side == "ours" else f", **{ratio(theirs, ours):.2f}**"))
        ends, cpu_ends = ([run[clock][-1] for run in repeats] for clock in ("ends", "cpu_ends"))
        reached = statistics.median(run["points"][-1][1] for run in repeats)
        rows.append([*cells, spread(ends, 0), spread(cpu_ends, 0), f"{reached:.1f}%"])
    gains = (f"s to +{gain} points" for gain in GAINS)
    return table_of(("side", "s to the first step", *gains, "s to the last step", "CPU s", "accuracy then"), rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--side", choices=SIDES, nargs="*", default=list(SIDES))
    options = parser.parse_args()
    steps, snapshots, problems = (40, 2, 50) if options.quick else (STEPS, 8, 2000)
    run = partial(measure, steps=steps, snapshots=snapshots, problems=problems, threads=options.threads)
    base = accuracy(EXAMPLE / "base", problems=problems, threads=options.threads)
    results = measure_by_turns(
        {"example": {side: partial(run, side) for side in options.side}},
        options,
        check=check_losses,
    )
    machine = machine_line(options.threads, "torch", "transformers", "trl")
    text = f"{machine}. {base:.1f}% of {problems:,} problems before training.\n\n{table(results['example'], base)}"
    publish("learning.py", text, write=options.write)


if __name__ == "__main__":
    main()
