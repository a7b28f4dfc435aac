"""The sides of the step benchmark, each in a process of its own: `step_sides.py SIDE FILE` prints its figures as JSON.

ours: what `dpo-train` does in a step, metrics included. trl: DPOTrainer as it is. fair: the same, projecting response
positions only, as it does on a GPU. grouped: fair, with the timed pairs in the order of transformers' length-grouped
sampler. Everything that is not the step itself (tokenising, scoring the reference) is left out on every side.
"""

from __future__ import annotations

import functools
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
from step_cases import Pair, StepCase, load
from transformers import AutoModelForCausalLM, Qwen2Config
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


def model_of(case: StepCase, attention: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**case.model_config), attn_implementation=attention)
    if case.dtype == "bfloat16":
        # Both sides start from weights that bfloat16 can hold, as they come in published models.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    return model.train()


def ours(case: StepCase, pairs: list[Pair], run: Callable[[], Record]) -> Record:
    from dpo_cli.batch.plan import microbatches
    from dpo_cli.data.example import Example
    from dpo_cli.engine.interface import OptimizerSettings
    from dpo_cli.engine.ranks import SoleRank
    from dpo_cli.engine.replicated import ReplicatedEngine
    from dpo_cli.losses.dpo import dpo_loss
    from dpo_cli.policy.packed_model import PackedModel
    from dpo_cli.reference.sums import ReferenceSums
    from dpo_cli.train.batch_loss import BatchLoss
    from dpo_cli.train.metric_sums import MetricSums
    from dpo_cli.train.micro_batch import PreferenceData
    from dpo_cli.train.objective import Objective

    class Listed(list[Example]):
        @property
        def sizes(self) -> Any:
            return np.array([example.packed_tokens for example in self], dtype=np.int32)

    def ids(tokens: list[int]) -> Any:
        return np.array(tokens, dtype=np.int32)

    record = run()
    examples = Listed(Example(ids(pair.prompt), (ids(pair.chosen), ids(pair.rejected))) for pair in pairs)
    values = np.array([value for pair in pairs for value in (pair.reference_chosen, pair.reference_rejected)])
    reference = ReferenceSums(np.arange(len(pairs)), np.arange(0, len(values) + 1, 2), values, data="")
    batches = np.arange(len(pairs)).reshape(case.steps, case.global_pairs)
    # The smallest budget that gives every step as many micro-batches as the other sides take.
    wanted = case.global_pairs // case.micro_pairs
    budget = max(int(examples.sizes[batch].sum()) for batch in batches) // wanted
    while any(len(microbatches(examples.sizes[b].tolist(), tokens_per_microbatch=budget)) > wanted for b in batches):
        budget += 16

    model = model_of(case, "packed")
    model.to(getattr(torch, case.dtype))
    if case.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    packed = PackedModel(model)
    settings = OptimizerSettings("adamw", weight_decay=0.0, max_grad_norm=1.0)
    engine = ReplicatedEngine(packed, model, settings)
    objective = Objective.of(functools.partial(dpo_loss, beta=case.beta))
    loss, data = BatchLoss(packed, objective, torch.device("cpu")), PreferenceData(examples, reference)
    record.begin()
    for batch in batches:
        micros = data.microbatches(batch, tokens_per_microbatch=budget, ranks=SoleRank())
        outcome = loss.accumulate_gradient(micros, engine)
        result = engine.step(case.learning_rate, outcome.loss)
        window = MetricSums()
        window.merge(outcome.metrics)
        window.means()
        record.end_step(result.loss)
    return record


def trl(case: StepCase, pairs: list[Pair], run: Callable[[], Record], *, fair: bool, grouped: bool) -> Record:
    import trl.trainer.utils
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        """Its rows are tokenised, and scored by the reference, before."""

        losses: list[torch.Tensor]

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

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
        # Consulted for one thing there: whether all positions are projected, or those of responses only.
        trl.trainer.utils._use_triton = lambda _: True
    record = run()
    if grouped:
        first = case.warmup_steps * case.global_pairs
        generator = torch.Generator().manual_seed(0)
        order = get_length_grouped_indices([p.longest for p in pairs[first:]], case.global_pairs, generator=generator)
        pairs = pairs[:first] + [pairs[first + index] for index in order]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    )  # fmt: skip
    rows = [
        {
            "prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected,
            "ref_chosen_logps": pair.reference_chosen, "ref_rejected_logps": pair.reference_rejected,
        }
        for pair in pairs
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, max_steps=case.steps, per_device_train_batch_size=case.micro_pairs,
            gradient_accumulation_steps=case.global_pairs // case.micro_pairs, train_sampling_strategy="sequential",
            learning_rate=case.learning_rate, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, optim="adamw_torch_fused", beta=case.beta,
            gradient_checkpointing=case.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=case.dtype == "bfloat16", use_cpu=True, max_length=None, precompute_ref_log_probs=True,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Prepared(
            model_of(case, "sdpa"), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Timer()],
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
