"""The sides of the step benchmark, each in a process of its own: `step_sides.py SIDE FILE` prints its figures as JSON.

ours: what `dpo-train` does in a step, metrics included. trl: DPOTrainer as it is. fair: the same, projecting response
positions only, as it does on a GPU. grouped: fair, with the timed pairs in the order of transformers' length-grouped
sampler. On a GPU trl is fair already; flash: with flash-attn; half: weights and optimiser in bfloat16, too, which is
the fastest it can be, and another training: such weights do not feel a small learning rate.
Everything that is not the step itself (tokenising, scoring the reference) is left out on every side.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_report import forget_peak, peak_resident_bytes, resident_bytes
from case_model import model_of, rounded, with_same_adapters
from step_cases import Pair, StepCase, load
from transformers.trainer_pt_utils import get_length_grouped_indices


@dataclass
class Record:
    """What one side tells: the losses of its steps, when they ended on the clock and in processor time, its memory.

    base: what the process held after its imports. attention: the kernel that this tool chose.
    """

    device: str
    base: int
    attention: str | None = None
    losses: list[float] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)

    def begin(self) -> None:
        forget_peak()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._mark()

    def end_step(self, loss: float) -> None:
        self.losses.append(loss)
        self._mark()

    def _mark(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    def told(self) -> dict[str, Any]:
        seconds, cpu_seconds = np.diff(self.ends, axis=0).T.tolist()
        return {
            "losses": self.losses,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": self._peak(),
            "attention": self.attention,
        }

    def _peak(self) -> int:
        """Of the GPU all that was allocated at once, the model included; else of the process, less its imports."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_resident_bytes() - self.base


def ours(case: StepCase, pairs: list[Pair], run: Callable[[], Record]) -> Record:
    from our_side import our_training

    record = run()
    training = our_training(case, pairs)
    record.attention = training.attention
    record.begin()
    for batch in training.batches:
        record.end_step(training.take_step(batch))
    return record


def trl(case: StepCase, pairs: list[Pair], run: Callable[[], Record], *, side: str) -> Record:
    import peft
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

    if side != "trl" and case.device == "cpu":
        project_responses_only()
    record = run()
    if side == "grouped":
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
            use_cpu=case.device == "cpu", dataloader_pin_memory=case.device == "cuda",
        )  # fmt: skip
        flash = side == "flash" or (side == "half" and find_spec("flash_attn") is not None)
        model = model_of(case, "flash_attention_2" if flash else "sdpa")
        adapters = None
        if case.lora_rank:
            adapters = peft.LoraConfig(
                r=case.lora_rank, lora_alpha=case.lora_rank, lora_dropout=0.0, target_modules="all-linear",
                task_type="CAUSAL_LM",
            )  # fmt: skip
        trainer = Scored(
            rounded(model, torch.bfloat16) if side == "half" else model, args=settings,
            train_dataset=dataset_of(pairs, scored=True), processing_class=padding_tokenizer(), callbacks=[Timer()],
            peft_config=adapters,
        )  # fmt: skip
        if adapters is not None:
            with_same_adapters(trainer.model)
        trainer.losses = []
        trainer.train()
    return record


def main() -> None:
    warnings.simplefilter("ignore")
    side, (case, pairs) = sys.argv[1], load(Path(sys.argv[2]))
    model_of(replace(case, hidden=16 * case.heads, layers=1, vocabulary=64), "sdpa")

    def run() -> Record:
        """Called once all is imported, the model's code too: what the process holds then is not counted."""
        return Record(case.device, resident_bytes())

    try:
        record = ours(case, pairs, run) if side == "ours" else trl(case, pairs, run, side=side)
    except torch.OutOfMemoryError as error:
        print(json.dumps({"failed": f"out of memory: {str(error).splitlines()[0]}"}))
    else:
        print(json.dumps(record.told()))


if __name__ == "__main__":
    main()
