"""PDPO's generator: its values and gradients against the formulas, and its expected gradients by enumeration.

The policy of the enumeration is a table, so that every response can be visited with its probability.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_cli.errors import LossInputError
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.pdpo import pdpo_loss
from dpo_cli.losses.types import PairLogps, SampleLogps, declaration_of

BETA, GAMMA = 0.7, 0.4
RESPONSES = 7


def samples_of(count: int, seed: int = 0, *, prompts: int = 3, step: int = 0) -> SampleLogps:
    generator = torch.Generator().manual_seed(seed)
    policy, reference, truth_policy, truth_reference = -5 * torch.rand(
        4, count, dtype=torch.float64, generator=generator
    )
    return SampleLogps(
        policy=policy.requires_grad_(),
        reference=reference,
        tokens=torch.full((count,), 4.0, dtype=torch.float64),
        truth_policy=truth_policy,
        truth_reference=truth_reference,
        prompt=torch.arange(count) % prompts,
        step=step,
    )


def rewards_of(samples: SampleLogps) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of the samples, and of their ground truths."""
    assert samples.reference is not None and samples.truth_reference is not None
    reward = BETA * (samples.policy.detach() - samples.reference)
    return reward.numpy(), (BETA * (samples.truth_policy - samples.truth_reference)).numpy()


def loss_and_slopes(samples: SampleLogps, **parameters: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    values = pdpo_loss(samples, beta=BETA, gamma=GAMMA, **parameters).values
    (slopes,) = torch.autograd.grad(values.sum(), samples.policy)
    return values.detach().numpy(), slopes.numpy()


# --- values and gradients --------------------------------------------------------------------------------------------


def test_the_hinge_is_the_gap_to_the_ground_truth_where_the_sample_is_ranked_below_it() -> None:
    samples = samples_of(40)
    reward, truth = rewards_of(samples)
    values, slopes = loss_and_slopes(samples, generator="hinge")
    np.testing.assert_allclose(values, GAMMA * np.maximum(truth - reward, 0), atol=1e-14)
    np.testing.assert_allclose(slopes, np.where(reward < truth, -GAMMA * BETA, 0.0), atol=1e-14)
    assert 5 < (reward < truth).sum() < 35


def test_unhinged_is_the_gap_itself() -> None:
    samples = samples_of(40)
    reward, truth = rewards_of(samples)
    values, slopes = loss_and_slopes(samples, generator="unhinged")
    np.testing.assert_allclose(values, GAMMA * (truth - reward), atol=1e-14)
    np.testing.assert_allclose(slopes, np.full(40, -GAMMA * BETA), atol=1e-14)


@pytest.mark.parametrize("baseline", ["truth", "leave_one_out"])
@pytest.mark.parametrize("clip", [0.3, 100.0])
def test_policy_gradient_weighs_the_samples_log_prob_with_its_clipped_advantage(baseline: str, clip: float) -> None:
    samples = samples_of(40, prompts=9)
    reward, truth = rewards_of(samples)
    prompt = samples.prompt.numpy()
    others = np.array([
        np.mean([reward[j] for j in range(40) if prompt[j] == prompt[i] and j != i]) for i in range(40)
    ])  # fmt: skip
    advantage = np.clip(reward - (truth if baseline == "truth" else others), -clip, clip)
    values, slopes = loss_and_slopes(samples, generator="policy_gradient", baseline=baseline, advantage_clip=clip)
    np.testing.assert_allclose(values, -GAMMA * advantage * samples.policy.detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(slopes, -GAMMA * advantage, atol=1e-13)


def test_a_prompt_with_one_sample_has_no_others_to_be_compared_with() -> None:
    samples = samples_of(3, prompts=3)
    _, slopes = loss_and_slopes(samples, generator="policy_gradient", baseline="leave_one_out")
    assert (slopes == 0).all()


def test_a_sample_ranked_exactly_as_the_truth_is_not_below_it() -> None:
    samples = samples_of(2)
    same = SampleLogps(
        samples.policy, samples.reference, samples.tokens, samples.policy.detach(), samples.reference, samples.prompt, 0
    )
    values, slopes = loss_and_slopes(same, generator="hinge")
    assert (values == 0).all() and (slopes == 0).all()


def test_a_gap_of_rounding_is_none() -> None:
    samples = samples_of(3)
    assert samples.reference is not None
    # 0.0009 nats below the truth, 0.0011, and not a number, which must not be taken for a tie.
    truth = samples.policy.detach() + torch.tensor([0.0009, 0.0011, float("nan")], dtype=torch.float64)
    almost = SampleLogps(
        samples.policy, samples.reference, samples.tokens, truth, samples.reference, samples.prompt, 0
    )  # fmt: skip
    values, slopes = loss_and_slopes(almost, generator="hinge")
    np.testing.assert_allclose(values, GAMMA * BETA * np.array([0, 0.0011, np.nan]), atol=1e-14)
    np.testing.assert_allclose(slopes[:2], [0, -GAMMA * BETA], atol=1e-14)
    active = pdpo_loss(almost, beta=BETA, gamma=GAMMA).parts["generator/active_fraction"]
    np.testing.assert_array_equal(active[:2], [0, 1])


def test_only_the_samples_own_log_prob_carries_gradient() -> None:
    samples = samples_of(5)
    leaves = [samples.reference, samples.truth_policy, samples.truth_reference]
    for leaf in leaves:
        assert leaf is not None
        leaf.requires_grad_()
    for generator in ("hinge", "unhinged", "policy_gradient"):
        values = pdpo_loss(samples, beta=BETA, gamma=GAMMA, generator=generator).values
        found = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
        # The reference of a sample is a constant of every run; what must never have gradient is the truth.
        assert found[1] is None and found[2] is None


@pytest.mark.parametrize(("step", "weight"), [(0, 0.1), (4, 0.5), (9, 1.0), (500, 1.0)])
def test_gamma_grows_over_its_warm_up(step: int, weight: float) -> None:
    late, warming = samples_of(6, step=step), {"gamma_warmup_steps": 10}
    values, _ = loss_and_slopes(late, **warming)
    whole, _ = loss_and_slopes(late)
    np.testing.assert_allclose(values, weight * whole, rtol=1e-13)


def test_parts_are_told_before_their_weight() -> None:
    samples = samples_of(40)
    reward, truth = rewards_of(samples)
    parts = pdpo_loss(samples, beta=BETA, gamma=0.01).parts
    np.testing.assert_allclose(parts["loss/generator"], np.maximum(truth - reward, 0), atol=1e-14)
    np.testing.assert_allclose(parts["generator/reward_gap"], truth - reward, atol=1e-14)
    assert parts["generator/active_fraction"].mean() == (reward < truth).mean()
    np.testing.assert_allclose(parts["generator/kl"], reward / BETA, atol=1e-14)


def test_pairs_are_dpos() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = -9 * torch.rand(4, 6, dtype=torch.float64, generator=generator)
    pair = PairLogps(*tensors, torch.full((6,), 3.0), torch.full((6,), 5.0))
    given = {"beta": BETA, "label_smoothing": 0.1, "nll_alpha": 0.5}
    found, expected = pdpo_loss(pair, gamma=GAMMA, **given), dpo_loss(pair, **given)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.parts["loss/nll"], expected.parts["loss/nll"])


def test_without_a_reference_there_is_no_reward() -> None:
    samples = samples_of(2)
    with pytest.raises(LossInputError, match="reference"):
        pdpo_loss(SampleLogps(**{**vars(samples), "reference": None}), beta=BETA, gamma=GAMMA)


def test_at_gamma_zero_nothing_is_sampled() -> None:
    assert declaration_of(partial(pdpo_loss, beta=0.1, gamma=0.3)).on_policy
    assert not declaration_of(partial(pdpo_loss, beta=0.1, gamma=0)).on_policy
    assert not declaration_of(partial(pdpo_loss, beta=0.1, gamma=0.0)).on_policy


# --- expected gradients, by enumeration ------------------------------------------------------------------------------


@pytest.fixture(params=range(4))
def table(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, int]:
    """Logits of the policy, log-probs of the reference, and which response is the ground truth."""
    generator = torch.Generator().manual_seed(request.param)
    logits, reference = torch.randn(2, RESPONSES, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), reference.log_softmax(0), request.param % RESPONSES


def expected_gradient(logits: Tensor, reference: Tensor, truth: int, **parameters: Any) -> Tensor:
    """E over responses drawn from the policy of the gradient of the generator's value, with the draw held fixed."""
    total = torch.zeros(RESPONSES, dtype=torch.float64)
    probabilities = logits.detach().softmax(0)
    for response in range(RESPONSES):
        policy = logits.log_softmax(0)
        one = SampleLogps(
            policy[[response]], reference[[response]], torch.ones(1), policy.detach()[[truth]], reference[[truth]],
            torch.zeros(1, dtype=torch.int64), 0,
        )  # fmt: skip
        value = pdpo_loss(one, beta=BETA, gamma=GAMMA, **parameters).values.sum()
        (gradient,) = torch.autograd.grad(value, logits)
        total += probabilities[response] * gradient
    return total


def gradient_of(quantity: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(quantity, logits)
    return gradient


def ranked_below(logits: Tensor, reference: Tensor, truth: int) -> Tensor:
    reward = BETA * (logits.detach().log_softmax(0) - reference)
    return reward < reward[truth]


def test_unhinged_moves_nothing_on_average(table: tuple[Tensor, Tensor, int]) -> None:
    assert expected_gradient(*table, generator="unhinged").abs().max() < 1e-15


def test_the_hinge_raises_the_mass_of_what_is_ranked_below_the_ground_truth(table: tuple[Tensor, Tensor, int]) -> None:
    logits, reference, truth = table
    below = ranked_below(logits, reference, truth)
    mass = logits.softmax(0)[below].sum()
    expected = -GAMMA * BETA * gradient_of(mass, logits)
    found = expected_gradient(logits, reference, truth, generator="hinge")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    if below.any():
        stepped = (logits - 0.01 * found).softmax(0)
        assert stepped[below].sum() > mass


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_policy_gradient_climbs_the_expected_clipped_advantage(table: tuple[Tensor, Tensor, int], clip: float) -> None:
    """REINFORCE: with the advantages held fixed, its expected gradient is that of minus their mean."""
    logits, reference, truth = table
    reward = BETA * (logits.detach().log_softmax(0) - reference)
    advantage = (reward - reward[truth]).clamp(-clip, clip)
    expected = -GAMMA * gradient_of((logits.softmax(0) * advantage).sum(), logits)
    found = expected_gradient(logits, reference, truth, generator="policy_gradient", advantage_clip=clip)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_unclipped_policy_gradient_climbs_the_divergence_from_the_reference_whatever_the_discriminator_says(
    table: tuple[Tensor, Tensor, int],
) -> None:
    """The truth's reward is the same for all, which changes nothing; beta * KL(policy, reference) is left."""
    logits, reference, truth = table
    policy = logits.log_softmax(0)
    divergence = (policy.exp() * (policy - reference)).sum()
    expected = -GAMMA * BETA * gradient_of(divergence, logits)
    found = expected_gradient(logits, reference, truth, generator="policy_gradient", advantage_clip=1e9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    further = (logits - 0.01 * found).log_softmax(0)
    assert (further.exp() * (further - reference)).sum() > divergence


def test_a_leave_one_out_baseline_changes_no_expectation(table: tuple[Tensor, Tensor, int]) -> None:
    """Two samples of one prompt, all pairs of them: the same expected gradient as without any baseline."""
    logits, reference, truth = table
    reward = BETA * (logits.detach().log_softmax(0) - reference)
    probabilities, found = logits.detach().softmax(0), torch.zeros(RESPONSES, dtype=torch.float64)
    for first in range(RESPONSES):
        for second in range(RESPONSES):
            drawn = torch.tensor([first, second])
            policy = logits.log_softmax(0)
            two = SampleLogps(
                policy[drawn], reference[drawn], torch.ones(2), policy.detach()[[truth, truth]],
                reference[[truth, truth]], torch.zeros(2, dtype=torch.int64), 0,
            )  # fmt: skip
            values = pdpo_loss(
                two, beta=BETA, gamma=GAMMA, generator="policy_gradient", baseline="leave_one_out", advantage_clip=1e9
            ).values
            found += probabilities[first] * probabilities[second] * gradient_of(values.mean(), logits)
    expected = -GAMMA * gradient_of((logits.softmax(0) * reward).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
