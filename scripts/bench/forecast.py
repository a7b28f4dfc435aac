"""Compare the memory that is forecast with what training takes on a CPU: `python scripts/bench/forecast.py`.

Every case is a process of its own, which reports its peak resident memory less what it had after its imports: a first
small step that makes the optimiser's states, then two full micro-batches and a step. `--case NAME` runs one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpo_cli.forecast.layout import Layout, LoraLayout
from dpo_cli.forecast.memory import forecast_memory
from dpo_cli.forecast.shape import ModelShape

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A Qwen2-shaped model with random weights, and how it is trained."""

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
        )


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
    from dpo_cli.policy.lora import add_lora
    from dpo_cli.policy.packed_model import PackedModel

    random = np.random.default_rng(0)

    def row_of(pairs: int, longest: int, vocabulary: int = case.vocabulary) -> Any:
        def ids(count: int) -> Any:
            return random.integers(0, vocabulary, count).astype(np.int32)

        half = longest // 2
        return pack([_Example(ids(half), (ids(half + 1), ids(half + 1))) for _ in range(pairs)])

    small, full = row_of(1, 16), row_of(round(case.tokens / (1.5 * case.longest)), case.longest)

    def build(config: dict[str, Any]) -> Any:
        fields = dict(config)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields),
            attn_implementation="packed",
            dtype=getattr(torch, case.dtype),
        )

    # The model's code, threads and kernels are there before anything is counted.
    PackedModel(build(replace(case, hidden=64, layers=1, vocabulary=128).config))(
        row_of(1, 16, 128)
    ).logps.sum().backward()
    before = _resident_bytes()
    began = time.perf_counter()
    model = build(case.config)
    if case.lora_rank is not None:
        add_lora(model, _Lora(case.lora_rank), seed=0, base_name="bench")
    if case.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    packed = PackedModel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # As the engine has it: float32 masters, of which half-precision weights are a rounded copy.
    masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in trained]
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(masters, lr=1e-6, fused=True)
        if case.optimizer == "adamw"
        else torch.optim.RMSprop(masters, lr=1e-6, foreach=True)
    )
    for rows in ((small,), (full, full)):
        for row in rows:
            packed(row).logps.sum().backward()
            for parameter, master in zip(trained, masters, strict=True):
                if parameter is not master and parameter.grad is not None:
                    gradient = parameter.grad.float()
                    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                    parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(trained, masters, strict=True):
                if parameter is not master:
                    parameter.copy_(master)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "measured": peak - before,
        "tokens": len(full.input_ids),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True)
class _Lora:
    rank: int
    alpha: float = 32.0
    target_modules: str = "all-linear"


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - not a file of ours
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(CASES[options.measure])))
        return
    print("| case | parameters | tokens | forecast, MiB | measured, MiB | forecast / measured | peak at |")
    print("|---|---|---|---|---|---|---|")
    for name in [options.case] if options.case else CASES:
        case = CASES[name]
        # Freed tensors go back to the system at once, so that resident memory is memory in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        memory = forecast_memory(ModelShape.of(case.config), case.layout)
        print(
            f"| {name} | {found['parameters'] / 1e6:.1f} M | {found['tokens']:,.0f} | {memory.total / MIB:,.0f} "
            f"| {found['measured'] / MIB:,.0f} | {memory.total / found['measured']:.2f} | {memory.peak.name} |",
            flush=True,
        )
        print(f"{name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
