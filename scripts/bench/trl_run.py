"""What one writes to train with TRL what `dpo-train` trains, and a clock beside it: `trl_run.py FILE` prints JSON.

FILE: a TrlRun. ends: of every step, in seconds since this process was asked for and in seconds of its processor time.
losses: of every step. Reference log-probs are computed beforehand, and kept in the cache of `datasets`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench_report import seconds_since_launch


@dataclass(frozen=True)
class TrlRun:
    """model: a folder. data: a JSONL file of pairs. folder: for snapshots, every `save_every` steps if that is set.

    fair: multiply response positions only with the vocabulary. end_after: leave after so many steps, at once.
    in_our_order: the pairs of each step, and its learning rate, are those that `dpo-train` would take.
    resume: a snapshot to go on from.
    """

    model: str
    data: str
    folder: str
    steps: int
    pairs: int
    learning_rate: float
    beta: float
    fair: bool = True
    in_our_order: bool = False
    seed: int = 42
    warmup_steps: int = 10
    final_lr_fraction: float = 0.1
    save_every: int | None = None
    end_after: int | None = None
    resume: str | None = None


def train(run: TrlRun) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOTrainer
    from trl_side import arguments, project_responses_only

    from dpo_cli.batch.order import global_batch
    from dpo_cli.train.schedule import learning_rate

    class Timed(DPOTrainer):
        losses: list[torch.Tensor]

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss)
            return loss

    class InOurOrder(Timed):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            size = len(self.train_dataset)
            taken = (
                global_batch(step, seed=run.seed, examples=size, global_pairs=run.pairs) for step in range(run.steps)
            )
            return [int(index) for batch in taken for index in batch]

        def create_scheduler(self, *_: Any, **__: Any) -> Any:
            share = partial(
                learning_rate, schedule="cosine", peak=1.0, warmup_steps=run.warmup_steps, total_steps=run.steps,
                final_fraction=run.final_lr_fraction,
            )  # fmt: skip
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
            return self.lr_scheduler

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append((seconds_since_launch(), time.process_time()))
            if len(ends) == run.end_after:
                print(json.dumps(told()), flush=True)
                os._exit(0)

    def told() -> dict[str, Any]:
        return {"ends": ends, "losses": [float(loss) for loss in trainer.losses]}

    if run.fair:
        project_responses_only()
    ends: list[tuple[float, float]] = []
    # Without max_length, which no pair here reaches: with it, TRL scores anew for every output folder.
    settings = arguments(
        run.folder, max_steps=run.steps, per_device_train_batch_size=run.pairs, learning_rate=run.learning_rate,
        warmup_steps=run.warmup_steps, lr_scheduler_type="cosine", beta=run.beta, seed=run.seed,
        save_strategy="no" if run.save_every is None else "steps", save_steps=run.save_every or 500,
    )  # fmt: skip
    trainer = (InOurOrder if run.in_our_order else Timed)(
        AutoModelForCausalLM.from_pretrained(run.model), args=settings,
        train_dataset=load_dataset("json", data_files=run.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(run.model), callbacks=[Clock()],
    )  # fmt: skip
    trainer.losses = []
    trainer.train(resume_from_checkpoint=run.resume)
    return told()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(train(TrlRun(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
