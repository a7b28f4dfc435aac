"""What the losses converge to, on a handful of responses where the optimum is known in closed form.

The policy is a table: one logit a response. Preferences come from a Bradley-Terry (or Plackett-Luce) reward and enter
as exact expectations, so there is no sampling noise and the optimum must be met to many digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.ipo import ipo_loss
from dpo_cli.losses.plackett_luce import plackett_luce_loss
from dpo_cli.losses.robust_dpo import robust_dpo_loss
from dpo_cli.losses.types import PairLogps, RankedLogps

RESPONSES = 5


@pytest.fixture(params=[0, 1, 2])
def world(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """(log of the reference, reward), each (RESPONSES,)."""
    generator = torch.Generator().manual_seed(request.param)
    logits, reward = torch.randn(2, RESPONSES, dtype=torch.float64, generator=generator)
    return logits.log_softmax(0), 1.5 * reward


def minimise(expected_loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The log-probs of the tabular policy that minimises the loss, from a uniform start."""
    logits = torch.zeros(RESPONSES, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = expected_loss(logits.log_softmax(0))
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().log_softmax(0)


def every_pair(policy: Tensor, reference: Tensor) -> PairLogps:
    """All ordered pairs of different responses."""
    i, j = torch.tensor(list(itertools.permutations(range(RESPONSES), 2))).T
    tokens = torch.ones(len(i), dtype=torch.float64)
    return PairLogps(policy[i], policy[j], reference[i], reference[j], tokens, tokens)


def preferred(reward: Tensor) -> Tensor:
    """Bradley-Terry: how probable the label of each pair of `every_pair` is."""
    i, j = torch.tensor(list(itertools.permutations(range(RESPONSES), 2))).T
    return torch.sigmoid(reward[i] - reward[j])


def closed_form(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log of reference * exp(reward / beta) / Z, the optimum of reward minus beta times the divergence."""
    return (reference + reward / beta).log_softmax(0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_dpo_converges_to_the_closed_form(world: tuple[Tensor, Tensor], beta: float) -> None:
    reference, reward = world
    found = minimise(
        lambda policy: (preferred(reward) * dpo_loss(every_pair(policy, reference), beta=beta).values).sum()
    )
    torch.testing.assert_close(found, closed_form(reference, reward, beta), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("divergence", "f"),
    [
        ("forward_kl", lambda u: -u.log()),
        ("js_divergence", lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log()),
        ("alpha_divergence", lambda u: (u**0.4 - 0.4 * u - 0.6) / (0.4 * (0.4 - 1))),
    ],
)
def test_f_dpo_converges_to_the_policy_that_its_divergence_makes_optimal(
    world: tuple[Tensor, Tensor], divergence: str, f: Callable[[Tensor], Tensor]
) -> None:
    # The maximum of E[reward] - beta * sum of reference * f(policy / reference), found by itself.
    reference, reward = world
    beta = 2.0
    optimum = minimise(
        lambda policy: beta * (reference.exp() * f((policy - reference).exp())).sum() - (policy.exp() * reward).sum()
    )
    found = minimise(
        lambda policy: (
            preferred(reward)
            * dpo_loss(every_pair(policy, reference), beta=beta, f_divergence=divergence, f_alpha=0.4).values
        ).sum()
    )
    torch.testing.assert_close(found, optimum, rtol=0, atol=1e-5)
    assert (found - closed_form(reference, reward, beta)).abs().max() > 1e-2


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_plackett_luce_converges_to_the_same_closed_form(world: tuple[Tensor, Tensor], beta: float, k: int) -> None:
    reference, reward = world
    rankings = torch.tensor(list(itertools.permutations(range(RESPONSES), k)))
    best_first = reward[rankings]
    # The probability of a ranking: at each place, a softmax over what is left.
    probability = torch.stack([best_first[:, place:].softmax(dim=1)[:, 0] for place in range(k)], dim=1).prod(dim=1)

    def expected_loss(policy: Tensor) -> Tensor:
        everything = torch.ones_like(rankings, dtype=torch.bool)
        ranked = RankedLogps(policy[rankings], reference[rankings], everything.double(), everything)
        return (probability * plackett_luce_loss(ranked, beta=beta).values).sum()

    torch.testing.assert_close(minimise(expected_loss), closed_form(reference, reward, beta), rtol=0, atol=1e-6)


def test_robust_dpo_recovers_from_noisy_labels_what_dpo_finds_in_clean_ones(world: tuple[Tensor, Tensor]) -> None:
    reference, reward = world
    flip, beta = 0.2, 1.0
    clean = preferred(reward)
    noisy = (1 - flip) * clean + flip * (1 - clean)

    def expected(policy: Tensor, label_smoothing: float) -> Tensor:
        pairs = every_pair(policy, reference)
        return (noisy * robust_dpo_loss(pairs, beta=beta, label_smoothing=label_smoothing).values).sum()

    optimum = closed_form(reference, reward, beta)
    torch.testing.assert_close(minimise(lambda policy: expected(policy, flip)), optimum, rtol=0, atol=1e-6)
    # And without the correction it does not.
    assert (minimise(lambda policy: expected(policy, 0.0)) - optimum).abs().max() > 0.1


def test_summed_ipo_converges_to_its_own_closed_form(world: tuple[Tensor, Tensor]) -> None:
    # reference * exp(P(y beats a uniformly drawn response) / tau) / Z: bounded, however sure the preference.
    reference, reward = world
    tau = 0.4
    win_rate = torch.sigmoid(reward[:, None] - reward[None, :]).mean(dim=1)
    found = minimise(
        lambda policy: (
            preferred(reward) * ipo_loss(every_pair(policy, reference), beta=tau, average_logps=False).values
        ).sum()
    )
    torch.testing.assert_close(found, (reference + win_rate / tau).log_softmax(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_smoothed_dpo_draws_a_certain_preference_to_a_finite_margin(smoothing: float) -> None:
    # log((1 - e) / e), where plain DPO would go on for ever.
    beta = 0.1
    margin = torch.log(torch.tensor((1 - smoothing) / smoothing, dtype=torch.float64))
    chosen = (margin / beta)[None].requires_grad_()
    nothing = torch.zeros(1, dtype=torch.float64)
    pair = PairLogps(chosen, nothing, nothing, nothing, nothing + 1, nothing + 1)
    for label_smoothing, sign in ((smoothing, 0.0), (0.0, -1.0)):
        (slope,) = torch.autograd.grad(dpo_loss(pair, beta=beta, label_smoothing=label_smoothing).values, chosen)
        assert torch.sign(slope.round(decimals=12)) == sign
