"""The sides of the step benchmark, each in a process of its own: `step_sides.py SIDE FILE` prints its figures as JSON.

ours: what `dpo-train` does in a step, metrics included. trl: DPOTrainer as it is. fair: the same, projecting response
positions only, as it does on a GPU. grouped: fair, with the timed pairs in the order of transformers' length-grouped
sampler. Everything that is not the step itself (tokenising, scoring the reference) is left out on every side.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_report import forget_peak, peak_resident_bytes, resident_bytes
from case_model import model_of
from step_cases import Pair, StepCase, load
from transformers.trainer_pt_utils import get_length_grouped_indices

SIDES = ("ours", "trl", "fair", "grouped")


@dataclass
class Record:
    """What one side tells: the losses of its steps, when they ended on the clock and in processor time, its memory."""

    base: int
    losses: list[float] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)

    def begin(self) -> None:
        forget_peak()
        self._mark()

    def end_step(self, loss: float) -> None:
        self.losses.append(loss)
        self._mark()

    def _mark(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def told(self) -> dict[str, Any]:
        seconds, cpu_seconds = np.diff(self.ends, axis=0).T.tolist()
        return {
            "losses": self.losses,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": peak_resident_bytes() - self.base,
        }


def ours(case: StepCase, pairs: list[Pair], run: Callable[[], Record]) -> Record:
    from our_side import our_training

    record = run()
    training = our_training(case, pairs)
    record.begin()
    for batch in training.batches:
        record.end_step(training.take_step(batch))
    return record


def trl(case: StepCase, pairs: list[Pair], run: Callable[[], Record], *, fair: bool, grouped: bool) -> Record:
    from transformers import TrainerCallback
    from trl_side import TokenisedTrainer, arguments, dataset_of, padding_tokenizer, project_responses_only

    class Scored(TokenisedTrainer):
        """Its rows are scored by the reference before."""

        losses: list[torch.Tensor]

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss)
            return loss

    class Timer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            record.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.end_step(float(sum(trainer.losses)))
            trainer.losses.clear()

    if fair:
        project_responses_only()
    record = run()
    if grouped:
        first = case.warmup_steps * case.global_pairs
        generator = torch.Generator().manual_seed(0)
        order = get_length_grouped_indices([p.longest for p in pairs[first:]], case.global_pairs, generator=generator)
        pairs = pairs[:first] + [pairs[first + index] for index in order]
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            folder, max_steps=case.steps, per_device_train_batch_size=case.micro_pairs,
            gradient_accumulation_steps=case.global_pairs // case.micro_pairs, train_sampling_strategy="sequential",
            learning_rate=case.learning_rate, beta=case.beta, gradient_checkpointing=case.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=case.dtype == "bfloat16",
        )  # fmt: skip
        trainer = Scored(
            model_of(case, "sdpa"), args=settings, train_dataset=dataset_of(pairs, scored=True),
            processing_class=padding_tokenizer(), callbacks=[Timer()],
        )  # fmt: skip
        trainer.losses = []
        trainer.train()
    return record


def main() -> None:
    warnings.simplefilter("ignore")
    side, (case, pairs) = sys.argv[1], load(Path(sys.argv[2]))
    model_of(replace(case, hidden=64, layers=1, vocabulary=64), "sdpa")

    def run() -> Record:
        """Called once all is imported, the model's code too: what the process holds then is not counted."""
        return Record(resident_bytes())

    if side == "ours":
        record = ours(case, pairs, run)
    else:
        record = trl(case, pairs, run, fair=side != "trl", grouped=side == "grouped")
    print(json.dumps(record.told()))


if __name__ == "__main__":
    main()
