"""One run of the PDPO experiment: which command it is, what it left behind, and the file of results it ends in."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pdpo_base import LONGEST_ANSWER, Sizes, copy_example, examine, make_base, make_truths, posed_problems, train

from dpo_cli.data.arithmetic import Split
from dpo_cli.train.metrics_log import read_metrics

# One line of results.
Row = dict[str, Any]

# Of the prompts, the share that PDPO takes from the discriminator; DPO "on the same pairs" goes without it too.
GENERATOR_FRACTION = 0.2
GENERATORS = ("hinge", "unhinged", "policy_gradient")


@dataclass(frozen=True)
class Case:
    """What makes a result; a case that has one is not run again.

    method: base (no training), sft (imitates the chosen responses), dpo_all (on all pairs), dpo (on the pairs that
        PDPO's discriminator sees), dpo_nll (on all pairs, alpha 1), or the generator of PDPO.
    pairs: truth (chosen is the worked solution) or own (the base's own most frequent right answer).
    options: further words for dpo-train.
    """

    seed: int
    split: Split
    method: str
    beta: float | None
    gamma: float | None
    learning_rate: float
    steps: int
    pairs_per_step: int
    pairs: str
    base: str
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        # Sixteen digits of a hash may read as a number.
        return f"run-{hashlib.sha256(self.key.encode()).hexdigest()[:16]}"

    def words(self) -> list[str]:
        """For dpo-train, in the folder of the seed's base."""
        settings: dict[str, object] = {
            "model": "local",
            "model.path": "base/final",
            "data": "local",
            "data.train": f"{self.pairs}.jsonl",
            "data.eval": f"{self.pairs}-heldout.jsonl",
            "data.max_tokens": 512,
            "data.workers": 1,
            "data.generator_fraction": 0,
            "logger": "[]",
            "epochs": "null",
            "max_steps": self.steps,
            "global_pairs": self.pairs_per_step,
            "tokens_per_microbatch": 2048,
            "log_every": 10,
            "eval_every": 0,
            "save_every": 0,
            "optimizer.lr": self.learning_rate,
            "optimizer.warmup_steps": min(10, self.steps // 2),
            "optimizer.schedule": "cosine",
            "optimizer.final_lr_fraction": 0.1,
            "seed": self.seed,
            "run_dir": self.name,
            "store_dir": "store",
            **self._of_the_loss(),
        }
        return [f"{key}={value}" for key, value in settings.items()] + list(self.options)

    def _of_the_loss(self) -> dict[str, object]:
        if self.method == "sft":
            return {"loss": "sft_ref"}
        if self.method in ("dpo_all", "dpo_nll"):
            return {"loss": "dpo", "loss.beta": self.beta, "loss.nll_alpha": int(self.method == "dpo_nll")}
        share = {"loss": "pdpo", "loss.beta": self.beta, "data.generator_fraction": GENERATOR_FRACTION}
        if self.method == "dpo":
            return {**share, "loss.gamma": 0}
        if self.method not in GENERATORS:
            raise ValueError(f"no method is called {self.method!r}")
        return {
            **share,
            "loss.gamma": self.gamma,
            "loss.generator": self.method,
            "rollout.prompts_per_step": 8,
            "rollout.max_new_tokens": LONGEST_ANSWER,
        }


@dataclass(frozen=True)
class Workshop:
    """The folder of an experiment: bases/, and results.jsonl, to which every finished case adds a line.

    sizes: of each kind of base that is made anew for every seed; the others are the embedded example's.
    """

    folder: Path
    sizes: Mapping[str, Sizes]

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    def base(self, kind: str, seed: int) -> Path:
        """The folder of a base, which is made if it is not there."""
        if kind not in self.sizes:
            folder = self.folder / "bases" / kind
            copy_example(folder)
            return folder
        folder = self.folder / "bases" / f"{kind}-{seed}"
        make_base(folder, self.sizes[kind], seed=seed)
        return folder

    def rows(self) -> list[Row]:
        if not self.results.exists():
            return []
        return [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]

    def run(self, cases: Iterable[Case]) -> None:
        """Every case that has no result yet; another process may be busy with cases of other seeds."""
        for case in cases:
            if case.key in {row["key"] for row in self.rows()}:
                continue
            row = {"key": case.key, **asdict(case), **self._measured(case)}
            with self.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(row) + "\n")
            print(describe(row), flush=True)

    def _measured(self, case: Case) -> Row:
        folder = self.base(case.base, case.seed)
        began = time.process_time()
        model, run = folder / "base" / "final", folder / case.name
        if case.method == "base":
            told: Row = {"made_of": json.loads((folder / "base.json").read_text(encoding="utf-8"))}
        else:
            shutil.rmtree(run, ignore_errors=True)
            if any(word.startswith("data.generator=") for word in case.options):
                make_truths(folder)
            train(case.words(), folder)
            told, model = metrics_of(run), run / "final"
        # Of the processor, not of the clock: other programs may be running.
        told["train_cpu_seconds"] = round(time.process_time() - began, 1)
        told.update(
            asdict(examine(model, posed_problems(case.split, self.sizes.get(case.base, Sizes()), seed=case.seed)))
        )
        shutil.rmtree(run, ignore_errors=True)
        return told


def metrics_of(run: Path) -> Row:
    """Of the held-out pairs, at the end and against the start; of the generator, over the run."""
    lines = list(read_metrics(run / "metrics.jsonl"))
    first, *_, last = (line for line in lines if line["split"] == "eval")
    told: Row = {
        "reward_accuracy": last.get("rewards/accuracies"),
        "reward_margin": last.get("rewards/margins"),
        "chosen_change": last["logps/chosen"] - first["logps/chosen"],
        "rejected_change": last["logps/rejected"] - first["logps/rejected"],
    }
    for name in ("active_fraction", "reward_gap", "length", "eos_rate"):
        told[f"generator_{name}"] = mean_of(line.get(f"generator/{name}") for line in lines if line["split"] == "train")
    told["sampling_share"] = mean_of(line.get("perf/sampling_pct", 0) / 100 for line in lines if "loss" in line)
    return told


def mean_of(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def describe(row: Row) -> str:
    settings = " ".join(f"{name}={row[name]:g}" for name in ("beta", "gamma") if row[name] is not None)
    words = [f"{row['base']}-{row['seed']}", row["method"], settings, *row["options"]]
    return f"{' '.join(filter(None, words))}: {row['exact_match']:.1%}"


def lines_of(cases: Iterable[Case], rows: Iterable[Row]) -> Iterator[Row]:
    """The results of these cases, as far as there are any."""
    found = {row["key"]: row for row in rows}
    return (found[case.key] for case in cases if case.key in found)
