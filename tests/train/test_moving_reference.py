"""A reference that moves is the policy of a known step, scored once, and found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_batch_loss import CPU, Listed, packed_model, random_examples, reference_of

from dpo_cli.batch.order import global_batch
from dpo_cli.engine.ranks import SoleRank
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.packed_model import PackedModel, score_examples
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.moving_reference import MovingReference

EXAMPLES, PAIRS, EVERY, STEPS = 10, 4, 4, 11


@pytest.fixture
def moving(tmp_path: Path) -> Callable[..., MovingReference]:
    def make(policy: PackedModel, examples: Listed | None = None, **changes: Any) -> MovingReference:
        examples = examples or Listed(random_examples(EXAMPLES))
        made = MovingReference(
            every=EVERY, start=PreferenceData(examples, reference_of(examples)), policy=policy, device=CPU,
            ranks=SoleRank(), run_dir=tmp_path, seed=3, total_steps=STEPS, global_pairs=PAIRS,
            tokens_per_microbatch=40, say=lambda line: None,
        )  # fmt: skip
        return replace(made, **changes)

    return make


def drift(policy: PackedModel) -> None:
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)


def test_every_step_has_the_sums_of_the_policy_that_is_its_reference(moving: Callable[..., MovingReference]) -> None:
    """Against copies of the policy kept by hand, over two epochs and a half."""
    policy = packed_model()
    reference = moving(policy)
    frozen = None
    for step in range(STEPS):
        if step and step % EVERY == 0:
            frozen = packed_model()
            frozen.load_state_dict(policy.state_dict())
        data = reference.data(step)
        indices = global_batch(step, seed=3, examples=EXAMPLES, global_pairs=PAIRS)
        assert data.reference is not None
        if frozen is None:
            assert data is reference.start
        else:
            for index in indices.tolist():
                example = data.examples[index]
                (expected,) = ([logps.sum() for logps in row] for row in score_examples(frozen, [example]))
                np.testing.assert_allclose(data.reference.of(index), expected, rtol=1e-12)
        drift(policy)


def test_a_resumed_run_finds_what_was_scored_and_scores_anew_only_at_a_change(
    moving: Callable[..., MovingReference],
) -> None:
    policy = packed_model()
    before = moving(policy).data(4).reference
    drift(policy)
    resumed = moving(policy)
    found = resumed.data(6).reference
    assert before is not None and found is not None
    assert found.digest == before.digest
    assert resumed.data(7).reference is found
    anew = moving(policy).data(4).reference
    assert anew is not None and anew.digest != before.digest


def test_token_weights_count_as_in_the_step(moving: Callable[..., MovingReference]) -> None:
    examples = random_examples(EXAMPLES)
    halved = Listed(
        replace(e, weights=tuple(np.full(len(ids), 0.5, np.float32) for ids in e.responses)) for e in examples
    )
    plain, weighted = (moving(packed_model(), rows).data(4).reference for rows in (Listed(examples), halved))
    assert plain is not None and weighted is not None
    np.testing.assert_allclose(weighted.values, plain.values / 2, rtol=1e-12)


def test_what_was_scored_for_another_end_or_other_data_is_refused(moving: Callable[..., MovingReference]) -> None:
    policy = packed_model()
    moving(policy, total_steps=6).data(4)
    moving(policy, total_steps=6).data(5)
    with pytest.raises(CheckpointError, match="another step"):
        moving(policy, total_steps=8).data(5)
    with pytest.raises(CheckpointError, match="data"):
        moving(policy, Listed(random_examples(EXAMPLES, seed=1)), total_steps=6).data(5)
