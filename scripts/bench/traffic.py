"""Count what the workers exchange in a step, and compare it with the forecast: `python scripts/bench/traffic.py`.

Every case trains a tiny model on two ranks with the engine that a run has: a step in which DeepSpeed learns in which
order weights are used, then one of three micro-batches, in which every collective that torch.distributed is asked for
is counted. `--json` prints the figures; `scripts/bench/scaling.py` makes a table of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_cli.engine.rank import leave
from dpo_cli.forecast.layout import Layout, LoraLayout
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.forecast.traffic import Traffic, forecast_traffic

RANKS, MICRO_BATCHES = 2, 3
# Losses, norms and flags: a few numbers at a time.
_SCALARS_BYTES = 16
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Case:
    """stage: 0 for whole copies. reuse_distance: DeepSpeed's stage3_max_reuse_distance; its default keeps all here."""

    stage: Literal[0, 1, 2, 3]
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    reuse_distance: int = 1_000_000_000
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @property
    def shape(self) -> ModelShape:
        return ModelShape.of(CONFIG)

    @property
    def forecast(self) -> Traffic:
        layout = Layout(
            tokens=96,
            longest=64,
            bytes_per_weight=4 if self.dtype == "float32" else 2,
            gradient_checkpointing=self.gradient_checkpointing,
            lora=None if self.lora_rank is None else LoraLayout(self.lora_rank),
            zero_stage=self.stage,
            workers=RANKS,
            on_gpu=False,
            reuse_distance=self.reuse_distance,
        )
        return forecast_traffic(self.shape, layout, micro_batches=MICRO_BATCHES)


# About one layer: the model's end is kept until the backward pass, and of a layer that is computed again a part.
_ONE_LAYER = 40_000
CASES = {
    "whole copies": Case(0),
    "ZeRO-1": Case(1),
    "ZeRO-1, float32": Case(1, dtype="float32"),
    "ZeRO-2": Case(2),
    "ZeRO-2, adapters": Case(2, lora_rank=4),
    "ZeRO-3, all weights kept": Case(3),
    "ZeRO-3, all weights kept, float32": Case(3, dtype="float32"),
    "ZeRO-3, all weights kept, adapters": Case(3, lora_rank=4),
    "ZeRO-3, no weight kept": Case(3, reuse_distance=0),
    "ZeRO-3, one layer kept, checkpointed": Case(3, None, True, _ONE_LAYER),
    "ZeRO-3, one layer kept, checkpointed, adapters": Case(3, 4, True, _ONE_LAYER),
}


class Counter:
    """Stands between torch.distributed and whoever calls it: DeepSpeed looks its functions up there by name."""

    def __init__(self) -> None:
        self.gathered = self.reduced = 0
        import torch.distributed as dist

        whole: dict[str, tuple[Callable[..., int], bool, bool]] = {
            # name: the bytes of the whole tensor, from the call's arguments; gathers; reduces
            "all_reduce": (lambda tensor, **_: tensor.nbytes, True, True),
            "all_gather_into_tensor": (lambda output, *_, **__: output.nbytes, True, False),
            "all_gather": (lambda outputs, *_, **__: sum(each.nbytes for each in outputs), True, False),
            "reduce_scatter_tensor": (lambda output, whole, **_: whole.nbytes, False, True),
            "broadcast": (lambda tensor, *_, **__: tensor.nbytes, True, False),
            "reduce": (lambda tensor, *_, **__: tensor.nbytes, False, True),
        }
        for name, (size, gathers, reduces) in whole.items():
            setattr(dist, name, self._counting(getattr(dist, name), size, gathers=gathers, reduces=reduces))

    def _counting(
        self, call: Callable[..., Any], size: Callable[..., int], *, gathers: bool, reduces: bool
    ) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            names = ("tensor", "output_tensor", "output", "tensor_list", "input_tensor", "input")
            tensors = [*args, *(kwargs[name] for name in names if name in kwargs)]
            count = size(*tensors)
            if count > _SCALARS_BYTES:
                self.gathered += count * gathers
                self.reduced += count * reduces
            return call(*args, **kwargs)

        return counted


@dataclass
class _Example:
    prompt: Any
    responses: tuple[Any, ...]
    weights: None = field(default=None)


@dataclass(frozen=True)
class _Lora:
    rank: int
    alpha: float = 8.0
    target_modules: str = "all-linear"


def count() -> dict[str, dict[str, int]]:
    """The bytes of every case, on each of the ranks that a launcher has started."""
    counter = Counter()
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.batch.layout import pack
    from dpo_cli.engine.backend import Backend, Partitioned, Replicated, process_group
    from dpo_cli.engine.interface import Engine, OptimizerSettings
    from dpo_cli.engine.zero_config import ZeroSettings
    from dpo_cli.policy.checkpointing import enable_checkpointing
    from dpo_cli.policy.lora import add_lora
    from dpo_cli.policy.packed_model import PackedModel

    cpu, random = torch.device("cpu"), np.random.default_rng(0)
    prompt, chosen, rejected = (random.integers(0, 256, 16).astype(np.int32) for _ in range(3))
    row: Any = pack([_Example(prompt, (chosen, rejected))])

    def engine_for(case: Case) -> Engine:
        backend: Backend = Replicated(cpu, ranks)
        if case.stage:
            # DeepSpeed would keep the small tensors, of which a tiny model has no others.
            options = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": case.reuse_distance}
            if case.reuse_distance < case.shape.parameters:
                options["stage3_prefetch_bucket_size"] = 0
            options = options if case.stage == 3 else {}
            backend = Partitioned(cpu, ranks, ZeroSettings(case.stage, overrides={"zero_optimization": options}))
        dtype, fields = getattr(torch, case.dtype), dict(CONFIG)
        with backend.reading(dtype):
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=dtype)
        if case.lora_rank is not None:
            add_lora(model, _Lora(case.lora_rank), seed=0, base_name="bench")
        if case.gradient_checkpointing:
            enable_checkpointing(model)
        settings = OptimizerSettings("adamw", weight_decay=0.0, max_grad_norm=1.0)
        return backend.training(PackedModel(model.train()), model, settings, dtype)

    def step(engine: Engine, micro_batches: int) -> None:
        total = torch.zeros(())
        for _ in range(micro_batches):
            loss = engine.model(row).logps.sum()
            engine.backward(loss)
            total += loss.detach()
        engine.step(1e-6, total)

    found = {}
    with process_group(cpu) as ranks:
        for name, case in CASES.items():
            engine = engine_for(case)
            # DeepSpeed notes the order of weights in one pass, and its ranks compare notes before the next.
            step(engine, 2)
            before = Traffic(counter.gathered, counter.reduced)
            step(engine, MICRO_BATCHES)
            found[name] = asdict(Traffic(counter.gathered - before.gathered, counter.reduced - before.reduced))
            engine.close()
    return found


def launch() -> dict[str, Traffic]:
    """Count every case in fresh processes; what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, "--worker", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
        if not out.exists():
            raise SystemExit(done.stderr)
        return {name: Traffic(**bytes_) for name, bytes_ in json.loads(out.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the counted bytes of every case")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        found = count()
        if os.environ["RANK"] == "0":
            options.worker.write_text(json.dumps(found))
        leave(0)
    counted = launch()
    if options.json:
        print(json.dumps({name: asdict(traffic) for name, traffic in counted.items()}, indent=1))
        return
    for name, traffic in counted.items():
        forecast = CASES[name].forecast
        print(f"{name}: gathered {traffic.gathered:,} of {forecast.gathered:,}", end="; ")
        print(f"reduced {traffic.reduced:,} of {forecast.reduced:,}")


if __name__ == "__main__":
    main()
