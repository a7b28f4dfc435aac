"""The tables of docs/scaling.md: time and memory of a step, what workers exchange, the reference store.

    python scripts/bench/scaling.py             prints them
    python scripts/bench/scaling.py --write     puts them into the document

Two ranks train tiny models for the table of exchanges, and a small store is written for the reference's; all else is
arithmetic, on the steps and the memory that docs/performance.md and docs/memory.md report.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_report import replace_between, table_of
from step_cases import CASES, pairs_of
from traffic import CASES as TRAFFIC_CASES
from traffic import launch

from dpo_cli.data.example import Example
from dpo_cli.forecast.cost import ASSUMED_UTILISATION, Batch, forecast_step, scoring_work, work_of
from dpo_cli.forecast.layout import Layout, LoraLayout
from dpo_cli.forecast.memory import GIB, forecast_memory, trained_parameters
from dpo_cli.forecast.remedies import fits
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.forecast.traffic import Traffic, forecast_traffic, forward_traffic
from dpo_cli.reference.keys import example_keys
from dpo_cli.reference.lookup import plan_scoring
from dpo_cli.reference.store import ReferenceStore

DOCUMENTS = Path(__file__).resolve().parents[2] / "docs"
# What performance.md's profile found this processor's matrix products to reach, in operations a second.
CPU_PEAK = {"float32": 81e9, "bfloat16": 196e9}

SEVEN_BILLION = ModelShape.of({
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
})  # fmt: skip
SEVENTY_BILLION = ModelShape.of({
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
})  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Machines of eight H100 SXM. Bytes a second: memory; link, what collectives reach within one; port, of a network
    port, of which each machine has `ports`. docs/scaling.md names the sources.
    """

    tflops: float = 989
    device_bytes: float = 79.6 * GIB
    memory: float = 3.35e12
    link: float = 360e9
    port: float = 47e9
    ports: int = 8
    devices: int = 8

    def exchange_seconds(self, traffic: Traffic, workers: int) -> float:
        """Rings run through all devices of a machine and leave it through all of its ports."""
        slowest = self.link if workers <= self.devices else min(self.link, self.ports * self.port)
        return traffic.sent(workers) / slowest


FAST, SLOW = 0.5, 0.25


@dataclass(frozen=True)
class Plan:
    name: str
    shape: ModelShape
    layout: Layout
    global_pairs: int
    machine: Machine = Machine()

    def row(self) -> list[str]:
        layout, machine = self.layout, self.machine
        workers, memory = layout.workers, forecast_memory(self.shape, layout)
        step = forecast_step(self.shape, layout, global_pairs=self.global_pairs)
        traffic = forecast_traffic(self.shape, layout, micro_batches=step.micro_batches)
        exchange = machine.exchange_seconds(traffic, workers)
        # AdamW reads gradient, master and both moments, and writes all but the first, and the weight.
        update = 30 * trained_parameters(self.shape, layout) / workers / machine.memory
        fast, middle, slow = (
            step.seconds(device_tflops=machine.tflops, workers=workers, utilisation=share)
            for share in (FAST, ASSUMED_UTILISATION, SLOW)
        )
        least, most = max(fast, exchange) + update, slow + exchange + update
        fitting = fits(memory, machine.device_bytes)
        limit = "memory" if not fitting else "computation" if middle > exchange else "exchange"
        hours = [60_000 / self.global_pairs * seconds / 3600 for seconds in (least, most)]
        return [
            self.name,
            f"{layout.tokens:,}",
            "yes" if layout.gradient_checkpointing else "no",
            f"{memory.total / GIB:.1f}" + ("" if fitting else ": too much"),
            f"{step.micro_batches}",
            f"{fast:.1f}-{slow:.1f}",
            f"{traffic.sent(workers) / 1e9:,.0f}",
            f"{exchange:.1f}",
            f"{least:.1f}-{most:.1f}",
            f"{hours[0]:.1f}-{hours[1]:.1f}",
            f"{limit}" + (f" ({middle / exchange:.1f})" if fitting else ""),
        ]


def plans() -> list[Plan]:
    zero = Layout(tokens=6144, longest=2048, bytes_per_weight=2, zero_stage=3, workers=8)
    cheap = replace(zero, gradient_checkpointing=True)
    large, adapters = replace(cheap, workers=64), replace(cheap, lora=LoraLayout(16))
    seven, seventy, lora = "7B on 8", "70B on 64", "70B, adapters of rank 16, on 8"
    return [
        Plan(seven, SEVEN_BILLION, zero, 128),
        Plan(seven, SEVEN_BILLION, cheap, 128),
        Plan(seven, SEVEN_BILLION, replace(cheap, tokens=24576), 128),
        Plan(f"{seven}, ZeRO-2", SEVEN_BILLION, replace(cheap, zero_stage=2), 128),
        Plan(seventy, SEVENTY_BILLION, replace(large, tokens=3072), 256),
        Plan(seventy, SEVENTY_BILLION, replace(large, tokens=12288), 256),
        Plan(f"{seventy}, 2e9 reused", SEVENTY_BILLION, replace(large, tokens=3072, reuse_distance=2 * 10**9), 256),
        Plan(f"{seventy}, one port a machine", SEVENTY_BILLION, replace(large, tokens=12288), 256, Machine(ports=1)),
        Plan(lora, SEVENTY_BILLION, replace(adapters, gradient_checkpointing=False, tokens=3072), 128),
        Plan(lora, SEVENTY_BILLION, replace(adapters, tokens=3072), 128),
        Plan(lora, SEVENTY_BILLION, replace(adapters, tokens=12288), 128),
    ]  # fmt: skip


def forecast_table() -> str:
    heads = [
        "case", "tokens a row", "checkpointing", "GiB a GPU", "micro-batches", "computing, s", "sent, GB",
        "exchange, s", "step, s", "60,000 pairs, h", "limit (computing / exchange)",
    ]  # fmt: skip
    return table_of(heads, (plan.row() for plan in plans()))


def traffic_table() -> str:
    """Counted against forecast, each gathered / reduced."""
    rows = []
    for name, counted in launch().items():
        forecast = TRAFFIC_CASES[name].forecast
        ratio = forecast.sent(2) / counted.sent(2)
        figures = (f"{each.gathered:,} + {each.reduced:,}" for each in (forecast, counted))
        rows.append([name, *figures, "equal" if forecast == counted else f"{ratio:.2f}"])
    return table_of(["case", "forecast, bytes", "counted, bytes", "forecast / counted"], rows)


def step_table() -> str:
    """Processor seconds of performance.md's steps against their operations, at one share of the peak for all."""
    _, _, steps = _read("performance.md").partition("<!-- table: scripts/bench/step.py -->")
    steps, _, _ = steps.partition("<!-- end of table")
    measured = dict(re.findall(r"^\| ([^|]+) \| this tool \| [^|]+ \| ([\d.]+)", steps, flags=re.MULTILINE))
    found = []
    for name, case in CASES.items():
        if name not in measured or case.lengths not in ("prompt-heavy", "response-heavy"):
            continue
        pairs = pairs_of(case, None)[case.warmup_steps * case.global_pairs :]
        batch = Batch.of((len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs)
        together = case.micro_pairs * batch.tokens / batch.pairs
        layout = Layout(
            tokens=round(together),
            longest=1024,
            bytes_per_weight=4 if case.dtype == "float32" else 2,
            gradient_checkpointing=case.gradient_checkpointing,
        )
        shape = ModelShape.of({"model_type": "qwen2", **case.model_config})
        flops = work_of(shape, layout, batch).flops / case.timed_steps
        found.append((name, flops, CPU_PEAK[case.dtype], float(measured[name])))
    wide = CPU_PEAK["float32"]
    share = statistics.median(flops / peak / seconds for _, flops, peak, seconds in found if peak == wide)
    rows = []
    for name, flops, peak, seconds in found:
        expected = flops / peak / share
        speed = f"{flops / seconds / 1e9:.0f} of {peak / 1e9:.0f}"
        rows.append(
            [name, f"{flops / 1e9:.0f}", f"{seconds:.2f}", speed, f"{expected:.2f}", f"{expected / seconds:.2f}"]
        )
    heads = ["step", "GFLOP", "measured, s", "GFLOP/s", f"at {share:.0%} of the peak, s", "that / measured"]
    return table_of(heads, rows)


@dataclass(frozen=True)
class StoreCosts:
    """Measured on a small store. For each response: bytes on disk beside four a token, bytes of memory at the peak of
    planning, seconds of planning. Then seconds a byte of opening a store, which reads and hashes all of it.
    """

    disk: float
    planning_bytes: float
    planning_seconds: float
    opening: float


def measure_store(pairs: int = 4000, tokens: int = 300) -> StoreCosts:
    """What the real store takes on disk, and what finding out what is missing takes of memory and time."""
    random = np.random.default_rng(0)

    def ids() -> Any:
        return random.integers(0, 32000, tokens).astype(np.int32)

    examples: Any = [Example(prompt=ids(), responses=(ids(), ids()), origin="") for _ in range(pairs)]
    indices = np.arange(pairs)
    with tempfile.TemporaryDirectory() as folder:
        store = ReferenceStore(Path(folder))
        began = time.process_time()
        plan_scoring(examples, store, indices=indices, tokens_per_batch=8192)
        planning = time.process_time() - began
        tracemalloc.start()
        plan_scoring(examples, store, indices=indices, tokens_per_batch=8192)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        with store.writer() as writer:
            for example in examples:
                writer.add(example_keys(example), [np.zeros(tokens, np.float32)] * 2)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.arrow"))
        began = time.process_time()
        ReferenceStore(Path(folder))
        opening = (time.process_time() - began) / size
    responses = 2 * pairs
    return StoreCosts(size / responses - 4 * tokens, peak / responses, planning / responses, opening)


def store_tables(tokens: int = 300) -> tuple[str, str]:
    """Measured costs, and what they come to for large data: pairs with `tokens` in the prompt and in each response."""
    costs = measure_store(tokens=tokens)
    measured = [
        ["disk, beside 4 bytes a token", f"{costs.disk:.1f} bytes a response"],
        ["memory at the peak of planning, each rank", f"{costs.planning_bytes:.0f} bytes a response"],
        ["planning, each rank", f"{costs.planning_seconds * 1e6:.0f} microseconds a response"],
        ["opening a store, each rank", f"{costs.opening * 1e9:.1f} s a GB"],
    ]
    rows = []
    for count in (1_000_000, 100_000_000):
        responses, machine = 2 * count, Machine()
        size = responses * (4 * tokens + costs.disk)
        row = [f"{count:,}", f"{size / 1e9:,.1f}"]
        copied = Layout(24576, 600, 2, zero_stage=2, workers=64)
        partitioned = replace(copied, zero_stage=3)
        for shape, layout in (
            (SEVEN_BILLION, replace(copied, workers=8)), (SEVEN_BILLION, copied), (SEVENTY_BILLION, partitioned)
        ):  # fmt: skip
            workers = layout.workers
            batch = Batch.of([(tokens, tokens, tokens)] * (layout.tokens // (3 * tokens)))
            work = scoring_work(shape, batch)
            exchange = machine.exchange_seconds(forward_traffic(shape, layout), workers)
            computing = [
                work.seconds(device_tflops=machine.tflops, workers=1, utilisation=share) for share in (FAST, SLOW)
            ]
            passes = count / (batch.pairs * workers)
            hours = [passes * seconds / 3600 for seconds in (max(computing[0], exchange), computing[1] + exchange)]
            row.append(f"{hours[0]:.2g}-{hours[1]:.2g}" if hours[1] < 10 else f"{hours[0]:.0f}-{hours[1]:.0f}")
        row += [
            f"{24 * responses / 1e9:,.2f}",
            f"{costs.planning_bytes * responses / 1e9:,.1f}",
            f"{(costs.planning_seconds * responses + costs.opening * size) / 60:,.1f}",
        ]
        rows.append(row)
    heads = [
        "pairs", "store, GB", "7B on 8, h", "7B on 64, h", "70B on 64, h", "index, GB a rank", "planning, GB a rank",
        "planning and opening, minutes",
    ]  # fmt: skip
    return table_of(["of the store", "measured"], measured), table_of(heads, rows)


def _read(name: str) -> str:
    return (DOCUMENTS / name).read_text(encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    measured, large = store_tables()
    tables = {"exchange": traffic_table(), "steps": step_table(), "forecast": forecast_table()}
    tables |= {"store": measured, "large stores": large}
    for name, table in tables.items():
        print(f"{name}\n\n{table}")
        if options.write:
            begin, end = f"<!-- table: scripts/bench/scaling.py, {name} -->\n", f"<!-- end of table: {name} -->"
            replace_between(DOCUMENTS / "scaling.md", begin, end, table)


if __name__ == "__main__":
    main()
