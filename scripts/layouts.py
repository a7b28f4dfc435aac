"""The same training on one process and on every layout of ranks and ZeRO stages: how far apart they end.

    python scripts/layouts.py                 two ranks, then one; prints the table of docs/distributed.md
    python scripts/layouts.py --write         writes it there as well
    python scripts/layouts.py --long          prints a line a case
    python scripts/layouts.py --json FILE     every case's figures as JSON

Every case trains a tiny model for a few steps whose batches are cut into several micro-batches, and is compared with a
single process that does the same: largest difference of the step losses, of the gradient norms (relative) and of the
float32 weights. On CPUs with gloo; in float32 but for the cases that are named bfloat16, of which both sides round.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from dpo_cli.batch.order import global_batch
from dpo_cli.config.schema import LoraConfig
from dpo_cli.data.example import Example
from dpo_cli.engine.backend import Backend, Partitioned, Replicated, process_group
from dpo_cli.engine.interface import OPTIMIZER, WEIGHTS, Engine, OptimizerSettings, StepResult
from dpo_cli.engine.rank import leave
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.engine.zero_config import ZeroSettings
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.kto import kto_loss
from dpo_cli.losses.sft_ref import sft_ref_loss
from dpo_cli.policy.lora import add_lora
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.train.batch_loss import BatchLoss
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.objective import Objective

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "distributed.md"
BEGIN, END = "<!-- table: scripts/layouts.py -->\n", "<!-- end of table -->"
CPU = torch.device("cpu")
FIGURES = ("loss", "gradient_norm", "weights")
STEPS, PAIRS, TOKENS = 6, 7, 60
LOSSES: dict[str, Any] = {
    "dpo": functools.partial(dpo_loss, beta=0.3),
    "kto": functools.partial(kto_loss, beta=0.3),
    "sft_ref": sft_ref_loss,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """stage None: this tool's own engine. resumed_from: the stage that trains the first half, if another does.

    small_buckets: gradients are exchanged in several, and the largest of them alone.
    """

    stage: int | None
    tied: bool = True
    lora: bool = False
    loss: str = "dpo"
    optimizer: str = "adamw"
    checkpointing: bool = False
    resumed_from: int | None = None
    dtype: torch.dtype = torch.float32
    small_buckets: bool = False

    @property
    def name(self) -> str:
        stage = {None: "one process", 0: "replicated"}.get(self.stage, f"ZeRO-{self.stage}")
        model = f"{'tied' if self.tied else 'untied'}, {'LoRA' if self.lora else 'full'}"
        extras = [self.loss] * (self.loss != "dpo") + [self.optimizer] * (self.optimizer != "adamw")
        extras += ["checkpointing"] * self.checkpointing
        extras += [] if self.resumed_from is None else [f"resumed from stage {self.resumed_from}"]
        extras += ["small buckets"] * self.small_buckets
        extras += ["bfloat16"] * (self.dtype == torch.bfloat16)
        return ", ".join([stage, model, *extras])

    @property
    def group(self) -> str:
        """The line of the condensed table that this case is part of."""
        if self.dtype == torch.bfloat16:
            return "every stage in bfloat16, whose noise this is"
        if self.small_buckets:
            return "ZeRO-1, 2 and 3, gradients exchanged in many buckets"
        if self.resumed_from is not None:
            return "stage 0, 1 or 3 for three steps, then resumed at 0, 2 or 3"
        if self.loss != "dpo":
            return f"ZeRO-2 and 3, {self.loss}" + " (which couples the batch)" * (self.loss == "kto")
        if self.optimizer != "adamw":
            return "ZeRO-1 and 3, RMSprop"
        if self.checkpointing:
            return "ZeRO-3, gradient checkpointing"
        stage = f"ZeRO-{self.stage}" if self.stage else "replicated (`zero_stage: 0`)"
        return f"{stage}, tied or untied, full or LoRA"


def cases() -> list[Case]:
    """Every stage with every kind of model; what else could tell layouts apart, at the stages where it could."""
    found = [Case(stage, tied, lora) for stage in (0, 1, 2, 3) for tied in (True, False) for lora in (False, True)]
    found += [Case(stage, loss=loss) for stage in (2, 3) for loss in ("kto", "sft_ref")]
    found += [Case(stage, optimizer="rmsprop") for stage in (1, 3)]
    found += [Case(3, checkpointing=True)]
    found += [Case(to, resumed_from=start) for start in (0, 1, 3) for to in (0, 2, 3)]
    found += [Case(stage, small_buckets=True) for stage in (1, 2, 3)]
    found += [Case(stage, dtype=torch.bfloat16) for stage in (0, 1, 2, 3)]
    return found


class Rows(list[Example]):
    @property
    def sizes(self) -> Any:
        return np.array([example.packed_tokens for example in self], dtype=np.int32)


def data() -> PreferenceData:
    rng = np.random.default_rng(0)

    def ids(longest: int) -> Any:
        return rng.integers(0, 61, rng.integers(1, longest)).astype(np.int32)

    rows = Rows(
        Example(prompt=ids(14), responses=(ids(12), ids(12)), desirable=number % 3 != 0, origin=f"row {number}")
        for number in range(20)
    )
    values = -rng.random(40) * 30
    return PreferenceData(rows, ReferenceSums(np.arange(20), np.arange(0, 41, 2), values, data=""))


def model_of(case: Case) -> PackedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=case.tied, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    if case.lora:
        add_lora(
            model, LoraConfig(rank=4, alpha=8.0, target_modules="all-linear", merge=True), seed=0, base_name="tiny"
        )
    if case.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return PackedModel(model.to(case.dtype).train())


def engine_of(case: Case, stage: int | None, ranks: Ranks) -> Engine:
    backend: Backend = Replicated(CPU, SoleRank() if stage is None else ranks)
    if stage:
        # The embedding matrix has 1952 elements.
        options = {"zero_optimization": {"reduce_bucket_size": 1600}} if case.small_buckets else {}
        backend = Partitioned(CPU, ranks, ZeroSettings(stage, overrides=options))
    packed = model_of(case)
    settings = OptimizerSettings(case.optimizer, weight_decay=0.1, max_grad_norm=1.0)  # type: ignore[arg-type]
    return backend.training(packed, packed.model, settings, case.dtype)


def saved(engine: Engine, ranks: Ranks) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint would hold, on every rank."""
    mine = [(group, name, tensor.clone()) for group, name, tensor in engine.saved_tensors()]
    whole: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}, OPTIMIZER: {}}
    for share in ranks.gather(mine):
        for group, name, tensor in share:
            whole[group][name] = tensor
    return whole


def train(case: Case, engine: Engine, ranks: Ranks, steps: range) -> list[StepResult]:
    loss, rows = BatchLoss(engine.model, Objective.of(LOSSES[case.loss]), CPU, ranks), data()
    results = []
    for step in steps:
        indices = global_batch(step, seed=1, examples=len(rows.examples), global_pairs=PAIRS)
        micros = rows.microbatches(indices, tokens_per_microbatch=TOKENS, ranks=ranks)
        results.append(engine.step(3e-3 * (step + 1) / STEPS, loss.accumulate_gradient(micros, engine).loss))
    return results


def run(case: Case, ranks: Ranks) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    first = case.stage if case.resumed_from is None else case.resumed_from
    ranks = SoleRank() if case.stage is None else ranks
    engine = engine_of(case, first, ranks)
    results = train(case, engine, ranks, range(STEPS // 2))
    if case.resumed_from is not None:
        kept = saved(engine, ranks)
        engine.close()
        engine = engine_of(case, case.stage, ranks)
        engine.load(kept[WEIGHTS], kept[OPTIMIZER])
    results += train(case, engine, ranks, range(STEPS // 2, STEPS))
    weights = saved(engine, ranks)[WEIGHTS]
    engine.close()
    return results, weights


def differences(ranks: Ranks) -> Iterator[dict[str, Any]]:
    for case in cases():
        wanted, weights = run(dataclasses.replace(case, stage=None, resumed_from=None), ranks)
        found, reached = run(case, ranks)
        assert weights.keys() == reached.keys()
        yield {
            "ranks": ranks.size,
            "case": case.name,
            "group": case.group,
            "loss": max(abs(a.loss - b.loss) for a, b in zip(wanted, found, strict=True)),
            "gradient_norm": max(
                abs(a.gradient_norm / b.gradient_norm - 1) for a, b in zip(wanted, found, strict=True)
            ),
            "weights": max(float((weights[name] - reached[name]).abs().max()) for name in weights),
        }


def launch(ranks: int) -> list[dict[str, Any]]:
    """Start this file on so many processes and read what they found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, "--worker", str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, text=True, stderr=subprocess.PIPE, check=False)
        if not out.exists():
            raise SystemExit(done.stderr)
        found: list[dict[str, Any]] = json.loads(out.read_text())
        return found


def condensed(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest figures of every group, in the order in which groups appear."""
    largest: dict[tuple[int, str], dict[str, Any]] = {}
    for row in found:
        group = largest.setdefault((row["ranks"], row["group"]), {**row, "case": row["group"]})
        group |= {figure: max(group[figure], row[figure]) for figure in FIGURES}
    return list(largest.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| ranks | layout | loss | gradient norm | weights |", "|---|---|---|---|---|"]
    for row in rows:
        figures = " | ".join(f"{row[figure]:.0e}" if row[figure] else "0" for figure in FIGURES)
        lines.append(f"| {row['ranks']} | {row['case']} | {figures} |")
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text + END + rest.split(END, 1)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--long", action="store_true", help="a line for every case, not for every group of them")
    parser.add_argument("--write", action="store_true", help=f"put the condensed table into {DOCUMENT.name}")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 1])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        with process_group(CPU) as ranks:
            found = list(differences(ranks))
            if ranks.is_main:
                arguments.worker.write_text(json.dumps(found))
        leave(0)
    found = [row for ranks in arguments.ranks for row in launch(ranks)]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    print(table(found if arguments.long else condensed(found)), end="")
    if arguments.write:
        write(table(condensed(found)))


if __name__ == "__main__":
    main()
