"""This tool's side of the benchmarks: what `dpo-train` has once it has started, on the pairs of a case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from case_model import model_of, rounded, with_same_adapters
from step_cases import Pair, StepCase

from dpo_cli.batch.plan import microbatches
from dpo_cli.config.schema import LoraConfig
from dpo_cli.data.example import Example
from dpo_cli.engine.interface import OptimizerSettings
from dpo_cli.engine.ranks import SoleRank
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.policy.attention_routes import choose_attention
from dpo_cli.policy.checkpointing import enable_checkpointing
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.train.batch_loss import BatchLoss
from dpo_cli.train.device import choose_device
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.objective import Objective


@dataclass
class OurTraining:
    """What `dpo-train` has after its start. batches: (steps, global_pairs) pairs of each step.

    attention: the kernel it chose, in words; None where there was nothing to choose.
    """

    engine: Any
    attention: str | None
    batches: Any
    take_step: Callable[[Any], float]


def our_training(case: StepCase, pairs: list[Pair]) -> OurTraining:
    examples = examples_of(pairs)
    values = np.array([value for pair in pairs for value in (pair.reference_chosen, pair.reference_rejected)])
    reference = ReferenceSums(np.arange(len(pairs)), np.arange(0, len(values) + 1, 2), values, data="")
    batches = np.arange(len(pairs)).reshape(case.steps, case.global_pairs)
    # The smallest budget that gives every step as many micro-batches as the other sides take.
    wanted = case.global_pairs // case.micro_pairs
    budget = max(int(examples.sizes[batch].sum()) for batch in batches) // wanted
    while any(len(microbatches(examples.sizes[b].tolist(), tokens_per_microbatch=budget)) > wanted for b in batches):
        budget += 16

    device, dtype = choose_device(case.device), getattr(torch, case.dtype)
    model = packed_model_of(case)
    if case.lora_rank:
        from dpo_cli.policy.lora import add_lora

        lora = LoraConfig(rank=case.lora_rank, alpha=float(case.lora_rank), target_modules="all-linear", merge=True)
        add_lora(model, lora, seed=0, base_name="random weights")
        with_same_adapters(model)
    if case.gradient_checkpointing:
        enable_checkpointing(model)
    route = choose_attention(case.attention, model.config, device=device, dtype=dtype)
    packed = PackedModel(model, attention=route)
    settings = OptimizerSettings("adamw", weight_decay=0.0, max_grad_norm=1.0)
    engine = ReplicatedEngine(packed, model, settings)
    objective = Objective.of(functools.partial(dpo_loss, beta=case.beta))
    loss, data = BatchLoss(packed, objective, device), PreferenceData(examples, reference)

    def take_step(batch: Any) -> float:
        micros = data.microbatches(batch, tokens_per_microbatch=budget, ranks=SoleRank())
        outcome = loss.accumulate_gradient(micros, engine)
        result = engine.step(case.learning_rate, outcome.loss)
        window = MetricSums()
        window.merge(outcome.metrics)
        window.means()
        return result.loss

    return OurTraining(engine, route.told, batches, take_step)


def examples_of(pairs: list[Pair]) -> Any:
    """As the data room gives them."""

    class Listed(list[Example]):
        @property
        def sizes(self) -> Any:
            return np.array([example.packed_tokens for example in self], dtype=np.int32)

    def ids(tokens: list[int]) -> Any:
        return np.array(tokens, dtype=np.int32)

    return Listed(Example(ids(pair.prompt), (ids(pair.chosen), ids(pair.rejected))) for pair in pairs)


def packed_model_of(case: StepCase) -> Any:
    return rounded(model_of(case, "packed"), getattr(torch, case.dtype))
