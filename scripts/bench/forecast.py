"""Compare the memory that is forecast with what training takes on a CPU: `python scripts/bench/forecast.py`.

Every case trains in processes of its own, with the engine that a run has: a first small step that makes the
optimiser's states, then two full micro-batches and a step. Each process reports its peak resident memory less what it
had after its imports and the meeting of the ranks; the largest counts. `--case NAME` runs one of them, `--write` puts
the table of all into docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bench_report import MIB, replace_between

from dpo_cli.engine.rank import leave
from dpo_cli.forecast.layout import Layout, LoraLayout, Place
from dpo_cli.forecast.memory import Memory, forecast_memory
from dpo_cli.forecast.shape import ModelShape

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
BEGIN, END = "<!-- table: scripts/bench/forecast.py -->\n", "<!-- end of table -->"


@dataclass(frozen=True)
class Case:
    """A Qwen2-shaped model with random weights, and how it is trained.

    stage: None for a single process, 0 for whole copies, 1 to 3 for ZeRO. offload: where stage 3 keeps weights and
    optimiser. On a CPU that is the same memory: device and host are added up. reduce_bucket: DeepSpeed's
    reduce_bucket_size; None leaves it to the engine.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    tied: bool
    tokens: int
    longest: int
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    lora_rank: int | None = None
    heads: int = 8
    kv_heads: int = 2
    stage: Literal[0, 1, 2, 3] | None = None
    ranks: int = 1
    offload: Place = "none"
    reduce_bucket: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
        }

    @property
    def layout(self) -> Layout:
        return Layout(
            tokens=self.tokens,
            longest=self.longest,
            bytes_per_weight=4 if self.dtype == "float32" else 2,
            gradient_checkpointing=self.gradient_checkpointing,
            lora=None if self.lora_rank is None else LoraLayout(self.lora_rank),
            optimizer=self.optimizer,
            on_gpu=False,
            zero_stage=self.stage,
            workers=self.ranks,
            offload_optimizer=self.offload,
            offload_parameters=self.offload,
            reduce_bucket=self.reduce_bucket,
        )

    @property
    def forecast(self) -> Memory:
        return forecast_memory(ModelShape.of(self.config), self.layout)

    @property
    def forecast_bytes(self) -> float:
        """Of one process: its device, and its part of the host."""
        memory = self.forecast
        return memory.total + memory.host / self.ranks


# Of tensors much more than of activations.
_ZERO = Case(512, 2048, 6, 32768, False, 768, 256)
_TIED = replace(_ZERO, tied=True)
_NAMES = {0: "replicated", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}

CASES = {
    "small": Case(256, 1024, 4, 8192, True, 4608, 512),
    "small, checkpointed": Case(256, 1024, 4, 8192, True, 4608, 512, gradient_checkpointing=True),
    "deep": Case(384, 1536, 12, 16384, True, 1536, 256),
    "deep, checkpointed": Case(384, 1536, 12, 16384, True, 3072, 256, gradient_checkpointing=True),
    "untied": Case(512, 2048, 6, 32768, False, 1536, 512),
    "untied, rmsprop": Case(512, 2048, 6, 32768, False, 768, 256, optimizer="rmsprop"),
    "wide vocabulary": Case(512, 1536, 4, 151936, True, 1536, 256),
    "long pairs": Case(256, 1024, 4, 8192, True, 3072, 2048),
    "adapters": Case(512, 2048, 6, 32768, True, 1536, 256, lora_rank=16),
    "bfloat16": Case(256, 1024, 4, 32768, True, 1536, 256, dtype="bfloat16"),
    **{
        f"{_NAMES[stage]}, {ranks} rank{'s' * (ranks > 1)}": replace(_ZERO, stage=stage, ranks=ranks)
        for stage in (0, 1, 2, 3)
        for ranks in (1, 2)
    },
    **{
        f"{_NAMES[stage]}, 2 ranks, bfloat16": replace(_TIED, stage=stage, ranks=2, dtype="bfloat16")
        for stage in (1, 2, 3)
    },
    **{
        f"{_NAMES[stage]}, 2 ranks, small buckets": replace(_TIED, stage=stage, ranks=2, reduce_bucket=5_000_000)
        for stage in (2, 3)
    },
    "ZeRO-3, 2 ranks, adapters": replace(_TIED, stage=3, ranks=2, lora_rank=16),
    "ZeRO-3, 2 ranks, on the host": replace(_ZERO, stage=3, ranks=2, offload="cpu"),
}


@dataclass
class _Example:
    prompt: Any
    responses: tuple[Any, ...]
    weights: None = field(default=None)


def measure(case: Case) -> dict[str, float]:
    """Peak and seconds of one case, in this process, which must be a fresh one."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.batch.layout import pack
    from dpo_cli.engine.backend import Backend, Partitioned, Replicated, process_group
    from dpo_cli.engine.interface import Engine, OptimizerSettings
    from dpo_cli.engine.ranks import SoleRank
    from dpo_cli.engine.zero_config import ZeroSettings
    from dpo_cli.policy.checkpointing import enable_checkpointing
    from dpo_cli.policy.lora import add_lora
    from dpo_cli.policy.packed_model import PackedModel

    random = np.random.default_rng(0)
    device, dtype = torch.device("cpu"), getattr(torch, case.dtype)

    def row_of(pairs: int, longest: int, vocabulary: int = case.vocabulary) -> Any:
        def ids(count: int) -> Any:
            return random.integers(0, vocabulary, count).astype(np.int32)

        half = longest // 2
        return pack([_Example(ids(half), (ids(half + 1), ids(half + 1))) for _ in range(pairs)])

    small, full = row_of(1, 16), row_of(round(case.tokens / (1.5 * case.longest)), case.longest)

    def engine_for(config: dict[str, Any]) -> Engine:
        fields = dict(config)
        with backend.reading(dtype):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation="packed", dtype=dtype
            )
        if case.lora_rank is not None:
            add_lora(model, _Lora(case.lora_rank), seed=0, base_name="bench")
        if case.gradient_checkpointing:
            enable_checkpointing(model)
        settings = OptimizerSettings(case.optimizer, weight_decay=0.0, max_grad_norm=1.0)
        return backend.training(PackedModel(model.train()), model, settings, dtype)

    def step(engine: Engine, *rows: Any) -> None:
        total = torch.zeros(())
        for row in rows:
            loss = engine.model(row).logps.sum()
            engine.backward(loss)
            total += loss.detach()
        assert engine.step(1e-6, total).sound

    with nullcontext(SoleRank()) if case.stage is None else process_group(device) as ranks:
        backend: Backend = Replicated(device, ranks)
        if case.stage:
            bounds = {} if case.reduce_bucket is None else {"reduce_bucket_size": case.reduce_bucket}
            zero = ZeroSettings(case.stage, case.offload, case.offload, overrides={"zero_optimization": bounds})
            backend = Partitioned(device, ranks, zero)
        # The model's code, threads, kernels and connections are there before anything is counted.
        first = engine_for(replace(case, hidden=64, layers=1, vocabulary=128).config)
        step(first, row_of(1, 16, 128))
        first.close()
        del first
        before = _resident_bytes()
        began = time.perf_counter()
        engine = engine_for(case.config)
        parameters = sum(_numel(parameter) for parameter in engine.model.parameters())
        step(engine, small)
        step(engine, full, full)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "measured": max(ranks.gather(peak - before)),
            "tokens": len(full.input_ids),
            "parameters": parameters,
            "seconds": time.perf_counter() - began,
        }


def _numel(parameter: Any) -> int:
    """Of the whole parameter, also where this rank holds a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@dataclass(frozen=True)
class _Lora:
    rank: int
    alpha: float = 32.0
    target_modules: str = "all-linear"


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - not a file of ours
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def launch(name: str) -> dict[str, float]:
    """Measure a case in fresh processes."""
    case = CASES[name]
    command = [sys.executable]
    if case.stage is not None:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={case.ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    # Freed tensors go back to the system at once, so that resident memory is memory in use.
    given_back = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ, **given_back}
    done = subprocess.run(
        [*command, __file__, "--measure", name], env=environment, text=True, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measure(CASES[options.measure])
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        leave(0)
    if options.write and options.case != list(CASES):
        parser.error("--write needs all cases: leave --case out")
    lines = [
        "| case | parameters | tokens | forecast, MiB | measured, MiB | forecast / measured | peak at |",
        "|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n")
    for name in options.case:
        found, forecast = launch(name), CASES[name].forecast_bytes
        lines.append(
            f"| {name} | {found['parameters'] / 1e6:.1f} M | {found['tokens']:,.0f} | {forecast / MIB:,.0f} "
            f"| {found['measured'] / MIB:,.0f} | {forecast / found['measured']:.2f} "
            f"| {CASES[name].forecast.peak.name} |"
        )
        print(lines[-1], flush=True)
        print(f"{name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    if options.write:
        replace_between(DOCUMENT, BEGIN, END, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
