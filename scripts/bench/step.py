"""A training step of this tool and of TRL's DPOTrainer on the same pairs: `python scripts/bench/step.py`.

    python scripts/bench/step.py --real-data DIR --write       all cases; the table goes into docs/performance.md
    python scripts/bench/step.py --case prompt-heavy           one case
    python scripts/bench/step.py --device cuda --json gpu.json --write      the same on a GPU: its own cases and table
    python scripts/bench/step.py --quick                       that it runs, in a minute; its figures mean nothing

Every side of every case and repeat is a fresh process; sides alternate. The losses of the first steps must agree.
--json keeps all figures; a later run with the same file goes on from there. A side that runs out of memory, or ends
otherwise, is told of and left out, and the others go on.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_report import MIB, Run, Runs, machine_line, parser_of, publish, ratio, run_fresh, spread, table_of
from step_cases import CASES, QUICK_CASES, Pair, StepCase, pairs_of, save
from step_flops import attention_flops, needed_flops, padded_flops, product_flops
from step_gpu import GPU_CASES, device_line, gpu_sides

from dpo_cli.forecast.peaks import peak_tflops

SIDES = {"cpu": ("ours", "fair", "trl", "grouped"), "cuda": ("ours", "trl", "flash", "half", "grouped")}
SHOWN = {
    "cpu": {"ours": "this tool", "fair": "TRL, fair", "trl": "TRL as shipped", "grouped": "TRL fair, length-grouped"},
    "cuda": {
        "ours": "this tool", "trl": "TRL", "flash": "TRL, flash-attn", "half": "TRL, all in bfloat16",
        "grouped": "TRL, length-grouped",
    },
}  # fmt: skip
# How its command is called, and so its place in the document.
NAMES = {"cpu": "step.py", "cuda": "step.py --device cuda"}
# bfloat16 rounds each product to 3 digits, here and there in another order.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


def measure(side: str, file: Path, threads: int) -> Run:
    """One side in a fresh process."""
    # transformers' trainer would take all GPUs it sees.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    try:
        return run_fresh("step_sides.py", side, str(file), threads=threads, CUDA_VISIBLE_DEVICES=first)
    except subprocess.CalledProcessError as error:
        return {"failed": f"ended with code {error.returncode}"}


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
            told = runs[side][-1].get("failed", f"{time.perf_counter() - began:.0f} s")
            print(f"  {side}: {told}", file=sys.stderr, flush=True)
    check_losses(case, {side: found[-1]["losses"] for side, found in runs.items() if "failed" not in found[-1]})


def check_losses(case: StepCase, losses: dict[str, list[float]]) -> None:
    """Raise unless every side's steps had our losses.

    Length-grouped pairs only meet in the warm-up steps; weights in bfloat16 are the same before their first step only.
    """
    for side, theirs in losses.items() if "ours" in losses else ():
        compared = {"grouped": case.warmup_steps, "half": 1}.get(side, case.steps)
        tolerance = TOLERANCE["bfloat16" if side == "half" else case.dtype]
        for step, (a, b) in enumerate(zip(losses["ours"][:compared], theirs, strict=False)):
            # A step's rounding moves the weights of the next one, and AdamW divides by small gradients' roots.
            if not math.isclose(a, b, rel_tol=tolerance * (1 + step)):
                raise SystemExit(f"step {step}: the loss is {a} here and {b} of {side}: not the same work")


def timed_of(case: StepCase, pairs: list[Pair]) -> list[Pair]:
    return pairs[case.warmup_steps * case.global_pairs :]


def figures(case: StepCase, timed: list[Pair], runs: Runs) -> dict[str, dict[str, list[float]]]:
    """By side and measure, one value a repeat: seconds and processor seconds a step, tokens/s, pairs/s, MiB, TFLOP/s.

    Sides that failed in some repeat are left out.
    """
    tokens, flops = sum(pair.tokens for pair in timed), needed_flops(case, timed)
    found = {}
    for side, repeats in runs.items():
        if any("failed" in run for run in repeats):
            continue
        seconds, cpu_seconds = (
            [sum(run[clock][case.warmup_steps :]) for run in repeats] for clock in ("seconds", "cpu_seconds")
        )
        found[side] = {
            "seconds": [total / case.timed_steps for total in seconds],
            "cpu_seconds": [total / case.timed_steps for total in cpu_seconds],
            "tokens": [tokens / total for total in seconds],
            "pairs": [len(timed) / total for total in seconds],
            "memory": [run["peak_bytes"] / MIB for run in repeats],
            "tflops": [flops / total / 1e12 for total in seconds],
        }
    return found


def cpu_table(results: dict[str, dict[str, Any]]) -> str:
    header = (
        "case", "side", "s a step", "CPU s a step", "tokens/s", "pairs/s", "peak, MiB", "faster by", "less CPU by",
        "memory",
    )  # fmt: skip
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        found = result["figures"]
        for side in (side for side in SIDES["cpu"] if side in found):
            its = found[side]
            compared = ["", "", ""]
            if side != "ours" and "ours" in found:
                our = found["ours"]
                ratios = (
                    ratio(its["seconds"], our["seconds"]), ratio(its["cpu_seconds"], our["cpu_seconds"]),
                    ratio(our["memory"], its["memory"]),
                )  # fmt: skip
                compared = [f"**{value:.2f}**" for value in ratios]
            cells = (
                name if side == "ours" else "", SHOWN["cpu"][side], spread(its["seconds"], 2),
                spread(its["cpu_seconds"], 2),
                spread(its["tokens"], 0), spread(its["pairs"], 2), spread(its["memory"], 0), *compared,
            )  # fmt: skip
            rows.append(cells)
    return table_of(header, rows)


def gpu_table(results: dict[str, dict[str, Any]], peak: float | None) -> str:
    """peak: of the device in TFLOP/s, where it is known."""
    header = (
        "case", "side", "s a step", "tokens/s", "pairs/s", "TFLOP/s", "MFU", "peak, MiB", "faster by", "memory"
    )  # fmt: skip
    rows: list[Sequence[str]] = []
    for name, result in results.items():
        found, runs = result["figures"], result["runs"]
        for side in (side for side in SIDES["cuda"] if side in runs):
            first = [name if side == "ours" else "", SHOWN["cuda"][side]]
            if side not in found:
                failed = next(run["failed"] for run in runs[side] if "failed" in run)
                rows.append([*first, failed.partition(":")[0], *[""] * 7])
                continue
            its = found[side]
            used = f"{100 * statistics.median(its['tflops']) / peak:.0f}%" if peak else "unknown"
            compared = ["", ""]
            if side != "ours" and "ours" in found:
                our = found["ours"]
                ratios = ratio(its["seconds"], our["seconds"]), ratio(our["memory"], its["memory"])
                compared = [f"**{value:.2f}**" for value in ratios]
            cells = (
                *first, spread(its["seconds"], 3), spread(its["tokens"], 0), spread(its["pairs"], 1),
                spread(its["tflops"], 0), used, spread(its["memory"], 0), *compared,
            )  # fmt: skip
            rows.append(cells)
    return table_of(header, rows)


def attention_line(results: dict[str, dict[str, Any]]) -> str:
    """Which kernels this tool chose."""
    told = {
        run["attention"] for result in results.values() for run in result["runs"].get("ours", []) if "losses" in run
    }
    return f"Attention of this tool: {'; '.join(sorted(filter(None, told))) or 'the plain route'}.\n"


def losses_table(results: dict[str, dict[str, Any]], device: str) -> str:
    sides = SIDES[device]
    rows = []
    for name, result in results.items():
        steps = {side: runs[0].get("losses", [])[:3] for side, runs in result["runs"].items()}
        shown = (", ".join(f"{loss:.6f}" for loss in steps.get(side, [])) for side in sides)
        rows.append([name, *shown])
    return table_of(("case", *(SHOWN[device][side] for side in sides)), rows)


def work_table(results: dict[str, dict[str, Any]]) -> str:
    """What the timed steps have to compute, counted: the ratio that is there before anything is programmed well."""
    # How a step is computed, checkpointed or in bfloat16, does not change what there is to compute.
    distinct: dict[str, str] = {}
    for name, result in results.items():
        distinct.setdefault(str(result["work"]), name)
    rows = []
    for name in distinct.values():
        needed, padded = results[name]["work"]
        shown = (f"{gigaflops:,.0f}" for both in zip(needed, padded, strict=True) for gigaflops in both)
        rows.append([name, *shown, *(f"{theirs / ours:.2f}" for ours, theirs in zip(needed, padded, strict=True))])
    header = ("case", "products", "of TRL", "attention", "of TRL", "products of TRL, times", "attention of TRL, times")
    return table_of(header, rows)


def work_of(case: StepCase, pairs: list[Pair]) -> list[list[float]]:
    """GFLOP a step that the pairs need, and that TRL makes of them: of products with weights, and of attention."""
    needed = [sum(flops(case, pair) for pair in pairs) for flops in (product_flops, attention_flops)]
    return [[flops / case.timed_steps / 1e9 for flops in side] for side in (needed, padded_flops(case, pairs))]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", choices=(*CASES, *GPU_CASES), nargs="*", help="which cases (default: the device's)")
    parser.add_argument("--side", choices=sorted({*SIDES["cpu"], *SIDES["cuda"]}), nargs="*", help="(default: all)")
    parser.add_argument("--attention", default="auto", help="model.attention of this tool")
    parser.add_argument("--real-data", type=Path, help="folder with gsm8k/, preferences/ and qwen2-tokenizer/")
    options = parser.parse_args()
    device, known = options.device, {"cpu": CASES, "cuda": GPU_CASES}[options.device]
    cases = QUICK_CASES if options.quick else {name: known[name] for name in options.case or known}
    cases = {name: replace(case, device=device, attention=options.attention) for name, case in cases.items()}
    sides = options.side or (gpu_sides() if device == "cuda" else SIDES["cpu"])
    kept: dict[str, Any] = {"cases": {}}
    if options.json is not None and options.json.exists():
        kept = json.loads(options.json.read_text(encoding="utf-8"))
    kept["machine"] = machine_line(options.threads, "torch", "transformers", "trl")
    if device == "cuda":
        kept["machine"] = f"{device_line()}; {kept['machine']}"
    pairs = {name: pairs_of(case, options.real_data) for name, case in cases.items()}
    for repeat in range(1 if options.quick else options.repeats):
        for name, case in cases.items():
            result = kept["cases"].setdefault(name, {"runs": {}})
            result["work"] = work_of(case, timed_of(case, pairs[name]))
            if len(result["runs"].get("ours", [])) > repeat:
                continue
            print(f"{name}, repeat {repeat + 1}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            measure_once(case, pairs[name], result["runs"], sides=list(sides), threads=options.threads)
            result["figures"] = figures(case, timed_of(case, pairs[name]), result["runs"])
            if options.json is not None:
                options.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    ordered = {name: kept["cases"][name] for name in (*known, *QUICK_CASES) if name in kept["cases"]}
    if device == "cuda":
        shown = f"{attention_line(ordered)}\n{gpu_table(ordered, peak_tflops(kept['machine']))}"
    else:
        shown = f"{cpu_table(ordered)}\nGFLOP a step, counted:\n\n{work_table(ordered)}"
    text = f"{kept['machine']}.\n\n{shown}\nLosses of the first steps:\n\n{losses_table(ordered, device)}"
    publish(NAMES[device], text, write=options.write)
    if any("failed" in run for result in ordered.values() for runs in result["runs"].values() for run in runs):
        raise SystemExit("some sides failed; what they said is above")


if __name__ == "__main__":
    main()
