"""What a loss that learns from the policy's own samples needs beside the others: prompts, a reference that lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_cli.batch.order import examples_cycled
from dpo_cli.config.schema import Config, RolloutConfig
from dpo_cli.data.example import Example, Examples, IntArray
from dpo_cli.data.generator import Selected, Truths
from dpo_cli.engine.backend import Backend
from dpo_cli.engine.interface import Engine
from dpo_cli.policy.load import LoadedModel, load_frozen_start, load_reference
from dpo_cli.policy.packed_model import score_examples
from dpo_cli.reference.spot_check import spot_check, tolerance_per_token
from dpo_cli.rollout.answers import check_room, pad_id_of, positions_of, with_room
from dpo_cli.rollout.generate import Sampling, generate
from dpo_cli.train.generator import Generator, GeneratorSettings, Score
from dpo_cli.train.metrics_log import MetricsLog
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.reference_pass import SPOT_CHECKED_EXAMPLES

SAMPLES = "samples.jsonl"
Say = Callable[[str], None]


def fitting_truths(truths: Truths, policy: LoadedModel, config: Config, say: Say) -> Examples:
    """The prompts after which a whole sample fits the model. Raises DataError when there are none."""
    longest = config.rollout.max_new_tokens
    check_room(policy.model, truths.prompt_tokens, longest, key="rollout.max_new_tokens")
    fitting = np.array(with_room(policy.model, truths.prompt_tokens, longest), dtype=np.int64)
    others = np.setdiff1d(np.arange(len(truths)), fitting)
    if len(others):
        say(
            f"generator: {len(others):,} prompts are left out: with {longest:,} more tokens they would exceed the "
            f"model's {positions_of(policy.model):,} (first: {truths[int(others[0])].origin})"
        )
    return Selected(truths, fitting)


def truths_shown(config: Config, truths: Examples, total_steps: int) -> NDArray[np.int64]:
    """Ascending indices of the prompts that the run will answer."""
    return examples_cycled(total_steps, seed=config.seed, examples=len(truths), size=config.rollout.prompts_per_step)


def make_generator(
    config: Config,
    truths: PreferenceData,
    policy: LoadedModel,
    engine: Engine,
    backend: Backend,
    *,
    total_steps: int,
    run_dir: Path,
    say: Say,
    alive: ExitStack,
) -> Generator:
    """truths: with what the reference says of them.

    alive: keeps the reference, which scores what the policy writes, and the log of samples until training is over.
    """
    rollout, examples, reference = config.rollout, truths.examples, truths.reference
    assert reference is not None
    say(describe(rollout, len(examples)))
    score = _reference_of_samples(config, policy, engine, backend, alive)
    checked = spot_check(
        examples,
        reference,
        score,
        k=SPOT_CHECKED_EXAMPLES,
        seed=config.seed,
        tolerance=tolerance_per_token(policy.dtype_name),
        store=None,
    )
    say(checked.line.replace("reference:", "reference of samples:", 1))
    stops = policy.stop_token_ids
    sampling, pad_id = Sampling.of(rollout), pad_id_of(policy.tokenizer, stops)

    def respond(
        prompts: Sequence[IntArray], streams: Sequence[int], truths: Sequence[IntArray]
    ) -> list[list[IntArray]]:
        with engine.whole_weights():
            return generate(
                policy.model,
                prompts,
                sampling,
                samples_per_prompt=rollout.samples_per_prompt,
                streams=streams,
                stop_token_ids=stops,
                pad_id=pad_id,
                batch_tokens=rollout.batch_tokens,
                drafts=truths,
            )

    return Generator(
        settings=GeneratorSettings(
            seed=config.seed,
            total_steps=total_steps,
            prompts_per_step=rollout.prompts_per_step,
            refresh_every=rollout.refresh_every,
            keep_cut=rollout.keep_cut,
            tokens_per_microbatch=config.tokens_per_microbatch,
            shown_per_step=rollout.shown_per_step,
            stop_token_ids=stops,
        ),
        truths=examples,
        reference=reference,
        ranks=backend.ranks,
        device=backend.device,
        respond=respond,
        score=score,
        decode=lambda ids: str(policy.tokenizer.decode(ids)),
        log=alive.enter_context(MetricsLog(run_dir / SAMPLES)),
    )


def describe(rollout: RolloutConfig, prompts: int) -> str:
    """Whose samples these are, in one line."""
    each = "a sample" if rollout.samples_per_prompt == 1 else f"{rollout.samples_per_prompt} samples"
    told = f"generator: {rollout.prompts_per_step} of {prompts:,} prompts a step, {each} of each"
    own = Sampling.of(rollout).is_the_models_own
    if rollout.refresh_every == 1 and own:
        return told + ", drawn from the policy as it is at that step"
    notes = [] if rollout.refresh_every == 1 else [f"up to {rollout.refresh_every - 1} steps old"]
    notes += [] if own else ["not drawn from the policy's own distribution (temperature, top_p, top_k)"]
    return f"{told}; off-policy: {' and '.join(notes)}"


def _reference_of_samples(
    config: Config, policy: LoadedModel, engine: Engine, backend: Backend, alive: ExitStack
) -> Score:
    """The cheapest that there is: the policy without its adapters, else a frozen copy, partitioned as the policy is."""
    if policy.lora is not None and config.model.reference in (None, "start"):
        from dpo_cli.policy.lora import without_adapters

        def by_the_policy(examples: Sequence[Example]) -> list[list[NDArray[np.float32]]]:
            with without_adapters(policy.model):
                return score_examples(engine.model, examples)

        return by_the_policy

    reference = load_reference(
        config.model, policy, device=backend.device, max_tokens=config.data.max_tokens, reading=backend.reading
    ) or load_frozen_start(
        config.model, device=backend.device, max_tokens=config.data.max_tokens, reading=backend.reading
    )
    packed: torch.nn.Module = alive.enter_context(backend.scoring(reference.packed(), reference.dtype))
    return lambda examples: score_examples(packed, examples)
