"""What a run on these data takes, from the lengths they have rather than the longest they may have."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.forecast.cost import Batch, scoring_work, work_of
from dpo_cli.forecast.plan import Plan
from dpo_cli.inspection.measure import SplitFacts


@dataclass(frozen=True)
class RunCost:
    """tokens: that training computes. flops: of training, and of scoring with the reference once. seconds: of both.

    seconds: None where the device's speed is not known.
    """

    tokens: int
    training_flops: float
    reference_flops: float
    seconds: float | None


def run_cost(plan: Plan, facts: SplitFacts, *, epochs: float, scores_reference: bool) -> RunCost:
    """epochs: passes over the data that the run's steps make. The reference scores what is trained on, once."""
    tokens = int(facts.sizes.sum())
    batch = Batch(
        len(facts.sizes),
        tokens,
        scored=tokens - int(facts.prompt.sum()),
        looked_at=facts.attended,
        looked_at_in_prompts=float((facts.prompt.astype(float) ** 2).sum() / 2),
    )
    parts = [(work_of(plan.shape, plan.layout, batch), epochs)]
    parts += [(scoring_work(plan.shape, batch), min(1.0, epochs))] if scores_reference else []
    seconds = None
    if plan.device_tflops is not None:
        workers = plan.layout.workers
        seconds = sum(times * work.seconds(device_tflops=plan.device_tflops, workers=workers) for work, times in parts)
    training, *scoring = [times * work.flops for work, times in parts]
    return RunCost(int(tokens * epochs), training, sum(scoring), seconds)
