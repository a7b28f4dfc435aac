"""A training step of this tool and of TRL's DPOTrainer on the same pairs: `python scripts/bench/step.py`.

    python scripts/bench/step.py --real-data DIR --write       all cases; the table goes into docs/performance.md
    python scripts/bench/step.py --case prompt-heavy           one case
    python scripts/bench/step.py --quick                       that it runs, in a minute; its figures mean nothing

Every side of every case and repeat is a fresh process; sides alternate. The losses of the first steps must agree.
--json keeps all figures; a later run with the same file goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_report import MIB, Run, Runs, machine_line, parser_of, publish, ratio, run_fresh, spread
from step_cases import CASES, QUICK, Pair, StepCase, pairs_of, save

SIDES = ("ours", "fair", "trl", "grouped")
SHOWN = {"ours": "this tool", "fair": "TRL, fair", "trl": "TRL as shipped", "grouped": "TRL fair, length-grouped"}
# bfloat16 rounds each product to 3 digits, here and there in another order.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


def measure(side: str, file: Path, threads: int) -> Run:
    """One side in a fresh process."""
    return run_fresh("step_sides.py", side, str(file), threads=threads)


def measure_once(case: StepCase, pairs: list[Pair], runs: Runs, *, sides: list[str], threads: int) -> None:
    """One more run of every side, and proof that they did the same work."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "case.json"
        save(case, pairs, file)
        # Whatever a machine does at times falls on other sides in other turns.
        odd = len(runs.get("ours", [])) % 2
        for side in reversed(sides) if odd else sides:
            began = time.perf_counter()
            runs.setdefault(side, []).append(measure(side, file, threads))
            print(f"  {side}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    check_losses(case, {side: found[-1]["losses"] for side, found in runs.items()})


def check_losses(case: StepCase, losses: dict[str, list[float]]) -> None:
    """Raise unless every side's steps had our losses; length-grouped pairs only meet in the warm-up steps."""
    for side, theirs in losses.items():
        compared = case.warmup_steps if side == "grouped" else case.steps
        for step, (a, b) in enumerate(zip(losses["ours"][:compared], theirs, strict=False)):
            # A step's rounding moves the weights of the next one, and AdamW divides by small gradients' roots.
            if not math.isclose(a, b, rel_tol=TOLERANCE[case.dtype] * (1 + step)):
                raise SystemExit(f"step {step}: the loss is {a} here and {b} of {side}: not the same work")


def figures(case: StepCase, pairs: list[Pair], runs: Runs) -> dict[str, dict[str, list[float]]]:
    """By side and measure, one value a repeat: seconds and processor seconds a step, tokens/s, pairs/s, MiB."""
    timed = pairs[case.warmup_steps * case.global_pairs :]
    tokens = sum(pair.tokens for pair in timed)
    found = {}
    for side, repeats in runs.items():
        seconds, cpu_seconds = (
            [sum(run[clock][case.warmup_steps :]) for run in repeats] for clock in ("seconds", "cpu_seconds")
        )
        found[side] = {
            "seconds": [total / case.timed_steps for total in seconds],
            "cpu_seconds": [total / case.timed_steps for total in cpu_seconds],
            "tokens": [tokens / total for total in seconds],
            "pairs": [len(timed) / total for total in seconds],
            "memory": [run["peak_bytes"] / MIB for run in repeats],
        }
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| case | side | s a step | CPU s a step | tokens/s | pairs/s | peak, MiB | faster by | less CPU by | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        found = result["figures"]
        for side in (side for side in SIDES if side in found):
            its = found[side]
            compared = ["", "", ""]
            if side != "ours":
                our = found["ours"]
                ratios = (
                    ratio(its["seconds"], our["seconds"]), ratio(its["cpu_seconds"], our["cpu_seconds"]),
                    ratio(our["memory"], its["memory"]),
                )  # fmt: skip
                compared = [f"**{value:.2f}**" for value in ratios]
            cells = (
                name if side == "ours" else "", SHOWN[side], spread(its["seconds"], 2), spread(its["cpu_seconds"], 2),
                spread(its["tokens"], 0), spread(its["pairs"], 2), spread(its["memory"], 0), *compared,
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def losses_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| case | " + " | ".join(SHOWN[side] for side in SIDES) + " |", "|---" * (len(SIDES) + 1) + "|"]
    for name, result in results.items():
        steps = {side: runs[0]["losses"][:3] for side, runs in result["runs"].items()}
        shown = (", ".join(f"{loss:.6f}" for loss in steps.get(side, [])) for side in SIDES)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--case", choices=CASES, nargs="*", help="which cases (default: all)")
    parser.add_argument("--side", choices=SIDES, nargs="*", default=list(SIDES))
    parser.add_argument("--real-data", type=Path, help="folder with gsm8k/, preferences/ and qwen2-tokenizer/")
    options = parser.parse_args()
    cases = {"quick": QUICK} if options.quick else {name: CASES[name] for name in options.case or CASES}
    kept: dict[str, Any] = {"cases": {}}
    if options.json is not None and options.json.exists():
        kept = json.loads(options.json.read_text(encoding="utf-8"))
    kept["machine"] = machine_line(options.threads, "torch", "transformers", "trl")
    for repeat in range(1 if options.quick else options.repeats):
        for name, case in cases.items():
            result = kept["cases"].setdefault(name, {"runs": {}})
            if len(result["runs"].get("ours", [])) > repeat:
                continue
            print(f"{name}, repeat {repeat + 1}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            pairs = pairs_of(case, options.real_data)
            measure_once(case, pairs, result["runs"], sides=options.side, threads=options.threads)
            result["figures"] = figures(case, pairs, result["runs"])
            if options.json is not None:
                options.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    ordered = {name: kept["cases"][name] for name in ({**CASES, "quick": QUICK}) if name in kept["cases"]}
    text = f"{kept['machine']}.\n\n{table(ordered)}\nLosses of the first steps:\n\n{losses_table(ordered)}"
    publish("step.py", text, write=options.write)


if __name__ == "__main__":
    main()
