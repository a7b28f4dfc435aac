"""A checkpoint of a training, in a process of its own: `saving_sides.py SIDE FILE` prints seconds as JSON.

ours: written, synced to the disk, read back and compared. trl: `DPOTrainer._save_checkpoint`, which leaves the bytes to
the system. Both hold weights, optimiser, random state and where the run stands; the first one warms up.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from case_model import model_of
from step_cases import Pair, StepCase, load

TIMED = 3
# Saves the checkpoint of a step.
Save = Callable[[int], object]


def ours(case: StepCase, pairs: list[Pair], folder: str) -> Save:
    from our_side import our_training

    from dpo_cli.train.checkpoint import CheckpointStore

    training, checkpoints = our_training(case, pairs), CheckpointStore(Path(folder), keep=1)
    # Before its first step an optimiser holds nothing.
    training.take_step(training.batches[0])
    engine = training.engine
    return lambda step: checkpoints.save(step, engine.saved_tensors(), {"step": step}, needed=engine.saved_bytes)


def trl(case: StepCase, pairs: list[Pair], folder: str) -> Save:
    from trl_side import TokenisedTrainer, arguments, dataset_of, padding_tokenizer

    settings = arguments(
        folder, per_device_train_batch_size=case.micro_pairs, max_steps=1, save_total_limit=1, save_strategy="steps",
        save_steps=1000,
    )  # fmt: skip
    trainer = TokenisedTrainer(
        model_of(case, "sdpa"), args=settings, train_dataset=dataset_of(pairs, scored=False),
        processing_class=padding_tokenizer(),
    )  # fmt: skip
    trainer.train()

    def save(step: int) -> None:
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, trial=None)

    return save


def main() -> None:
    warnings.simplefilter("ignore")
    side, (case, pairs) = sys.argv[1], load(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        save = {"ours": ours, "trl": trl}[side](case, pairs, folder)
        save(1)
        began = time.perf_counter(), time.process_time()
        for step in range(2, 2 + TIMED):
            save(step)
        seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps({"seconds": seconds / TIMED, "cpu_seconds": cpu_seconds / TIMED}))


if __name__ == "__main__":
    main()
