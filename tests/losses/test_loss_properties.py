"""What is known of the losses without computing them: where they start, their symmetries, that they never turn NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpo_cli.errors import LossInputError
from dpo_cli.losses.aot import aot_loss
from dpo_cli.losses.aot_unpaired import aot_unpaired_loss
from dpo_cli.losses.apo_down import apo_down_loss
from dpo_cli.losses.apo_zero import apo_zero_loss
from dpo_cli.losses.bco_pair import bco_pair_loss
from dpo_cli.losses.cpo import cpo_loss
from dpo_cli.losses.discopop import discopop_loss
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.exo_pair import exo_pair_loss
from dpo_cli.losses.hinge import hinge_loss
from dpo_cli.losses.ipo import ipo_loss
from dpo_cli.losses.kto import kto_loss
from dpo_cli.losses.mix import mix_loss
from dpo_cli.losses.nca_pair import nca_pair_loss
from dpo_cli.losses.orpo import orpo_loss
from dpo_cli.losses.plackett_luce import plackett_luce_loss
from dpo_cli.losses.robust_dpo import robust_dpo_loss
from dpo_cli.losses.sigmoid_norm import sigmoid_norm_loss
from dpo_cli.losses.simpo import simpo_loss
from dpo_cli.losses.sppo_hard import sppo_hard_loss
from dpo_cli.losses.types import LossValues, PairLogps, RankedLogps, UnpairedLogps

PairLoss = Callable[[PairLogps], LossValues]

WITH_REFERENCE: dict[str, PairLoss] = {
    "dpo": partial(dpo_loss, beta=0.1),
    "dpo, smoothed": partial(dpo_loss, beta=0.1, label_smoothing=0.2),
    "dpo of averages": partial(dpo_loss, beta=2.0, average_logps=True),
    "dpo, forward_kl": partial(dpo_loss, beta=0.1, f_divergence="forward_kl"),
    "dpo, js_divergence": partial(dpo_loss, beta=0.1, f_divergence="js_divergence"),
    "dpo, alpha_divergence": partial(dpo_loss, beta=0.1, f_divergence="alpha_divergence", f_alpha=0.3),
    "robust_dpo": partial(robust_dpo_loss, beta=0.1, label_smoothing=0.2),
    "ipo": partial(ipo_loss, beta=0.25),
    "ipo of sums": partial(ipo_loss, beta=0.25, average_logps=False),
    "hinge": partial(hinge_loss, beta=0.1),
    "apo_zero": partial(apo_zero_loss, beta=0.1),
    "apo_down": partial(apo_down_loss, beta=0.1),
    "exo_pair": partial(exo_pair_loss, beta=0.1, label_smoothing=0.05),
    "nca_pair": partial(nca_pair_loss, beta=0.1),
    "sppo_hard": partial(sppo_hard_loss, beta=0.25),
    "discopop": partial(discopop_loss, beta=0.1),
    "sigmoid_norm": partial(sigmoid_norm_loss, beta=5.0),
    "aot": partial(aot_loss, beta=0.1),
    "aot, smoothed": partial(aot_loss, beta=0.1, label_smoothing=0.2),
    "aot_unpaired": partial(aot_unpaired_loss, beta=0.1),
    "bco_pair": partial(bco_pair_loss, beta=0.1),
    "bco_pair, unshifted": partial(bco_pair_loss, beta=0.1, reward_shift="none"),
    "mix": partial(mix_loss, beta=0.1, losses=[{"loss": "dpo", "weight": 0.8}, {"loss": "apo_zero", "weight": 0.3}]),
}
WITHOUT_REFERENCE: dict[str, PairLoss] = {
    "dpo, reference-free": partial(dpo_loss, beta=0.1, reference_free=True),
    "simpo": partial(simpo_loss, beta=2.0, gamma=1.0),
    "simpo with nll": partial(simpo_loss, beta=2.0, gamma=1.0, nll_alpha=0.5),
    "cpo": partial(cpo_loss, beta=0.1),
    "orpo": partial(orpo_loss, beta=0.1),
}
PAIR_LOSSES = WITH_REFERENCE | WITHOUT_REFERENCE

log_ratios = st.floats(-30, 30)


def one_pair(chosen: float, rejected: float, *, tokens: tuple[int, int] = (20, 30)) -> PairLogps:
    """A pair with the given log-ratios to the reference."""
    reference = torch.tensor([[-50.0], [-60.0]], dtype=torch.float64)
    policy = reference + torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    lengths = torch.tensor(tokens, dtype=torch.float64)[:, None]
    return PairLogps(*policy, *reference, *lengths)


def swapped(pair: PairLogps) -> PairLogps:
    return PairLogps(
        pair.policy_rejected,
        pair.policy_chosen,
        pair.reference_rejected,
        pair.reference_chosen,
        pair.rejected_tokens,
        pair.chosen_tokens,
    )


# --- start values: policy = reference --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("dpo", math.log(2)),
        ("dpo, smoothed", math.log(2)),
        ("dpo of averages", math.log(2)),
        ("dpo, forward_kl", math.log(2)),
        ("dpo, js_divergence", math.log(2)),
        ("dpo, alpha_divergence", math.log(2)),
        ("robust_dpo", math.log(2)),
        ("ipo", 1 / (4 * 0.25**2)),
        ("ipo of sums", 1 / (4 * 0.25**2)),
        ("hinge", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("exo_pair", -math.log(0.05 * 0.95) / 2 - math.log(2)),
        ("nca_pair", 2 * math.log(2)),
        ("sppo_hard", 1 / (2 * 0.25**2)),
        ("discopop", (1 + math.log(2)) / 2),
        ("sigmoid_norm", math.log(2)),
        ("aot", math.log(2)),
        ("aot, smoothed", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("bco_pair, unshifted", 2 * math.log(2)),
        ("mix", 0.8 * math.log(2) + 0.3),
    ],
)
def test_a_policy_equal_to_its_reference_has_the_known_start_value(name: str, start: float, dtype: torch.dtype) -> None:
    chosen, rejected = torch.tensor([[-300.0, -1.5], [-7.25, -2000.0]], dtype=dtype)
    tokens = torch.tensor([100.0, 3.0], dtype=dtype)
    values = PAIR_LOSSES[name](PairLogps(chosen, rejected, chosen, rejected, tokens, tokens)).values
    assert values.dtype == dtype
    torch.testing.assert_close(values, torch.full_like(values, start), rtol=0, atol=max(torch.finfo(dtype).eps, 1e-6))


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_plackett_luce_starts_at_the_log_of_the_number_of_rankings(k: int) -> None:
    policy = -torch.rand(3, k) * 100
    ranked = RankedLogps(policy, policy, torch.ones(3, k), torch.ones(3, k, dtype=torch.bool))
    torch.testing.assert_close(plackett_luce_loss(ranked, beta=0.1).values, torch.full((3,), math.lgamma(k + 1)))


def test_kto_starts_at_half_its_weight() -> None:
    policy = torch.tensor([-10.0, -20.0, -30.0])
    desirable = torch.tensor([True, False, True])
    unpaired = UnpairedLogps(policy, policy, torch.ones(3), desirable, policy - 5, policy - 5)
    values = kto_loss(unpaired, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5).values
    torch.testing.assert_close(values, torch.tensor([0.75, 0.25, 0.75]))


# --- symmetries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_LOSSES)
@given(chosen=log_ratios, rejected=log_ratios)
@settings(deadline=None, max_examples=30)
def test_swapping_the_responses_swaps_the_rewards(name: str, chosen: float, rejected: float) -> None:
    pair = one_pair(chosen, rejected)
    there, back = PAIR_LOSSES[name](pair).rewards, PAIR_LOSSES[name](swapped(pair)).rewards
    assert isinstance(there, tuple) and isinstance(back, tuple)
    assert there == back[::-1]


@given(chosen=log_ratios, rejected=log_ratios, beta=st.floats(0.01, 1))
@settings(deadline=None)
def test_swapping_the_responses_moves_dpo_by_exactly_the_margin(chosen: float, rejected: float, beta: float) -> None:
    # log sigmoid(m) - log sigmoid(-m) = m
    pair = one_pair(chosen, rejected)
    difference = dpo_loss(swapped(pair), beta=beta).values - dpo_loss(pair, beta=beta).values
    torch.testing.assert_close(difference, torch.tensor([beta * (chosen - rejected)]).double())


@given(ratios=st.tuples(log_ratios, log_ratios), beta=st.floats(0.01, 1), flip=st.floats(0, 0.45))
@settings(deadline=None)
def test_robust_dpo_over_flipped_labels_is_on_average_dpo_on_clean_ones(
    ratios: tuple[float, float], beta: float, flip: float
) -> None:
    pair = one_pair(*ratios)
    robust = partial(robust_dpo_loss, beta=beta, label_smoothing=flip)
    expectation = (1 - flip) * robust(pair).values + flip * robust(swapped(pair)).values
    torch.testing.assert_close(expectation, dpo_loss(pair, beta=beta).values, rtol=1e-9, atol=1e-12)


@given(ratios=st.tuples(log_ratios, log_ratios), flip=st.floats(0, 0.45))
@settings(deadline=None)
def test_smoothed_dpo_is_the_expectation_of_dpo_over_flipped_labels(ratios: tuple[float, float], flip: float) -> None:
    pair = one_pair(*ratios)
    expectation = (1 - flip) * dpo_loss(pair, beta=0.3).values + flip * dpo_loss(swapped(pair), beta=0.3).values
    torch.testing.assert_close(dpo_loss(pair, beta=0.3, label_smoothing=flip).values, expectation)


# --- what single losses aim at ---------------------------------------------------------------------------------------


def slopes(loss: PairLoss, chosen: float, rejected: float) -> tuple[float, float]:
    """d value / d log-ratio of the chosen and of the rejected response."""
    pair = one_pair(chosen, rejected)
    w, l_ = pair.policy_chosen.requires_grad_(), pair.policy_rejected.requires_grad_()
    up, down = torch.autograd.grad(loss(replace(pair, policy_chosen=w, policy_rejected=l_)).values.sum(), (w, l_))
    return float(up), float(down)


@pytest.mark.parametrize("smoothing", [1e-3, 0.1, 0.3])
def test_exo_and_smoothed_dpo_aim_at_the_same_margin_and_exo_is_a_divergence(smoothing: float) -> None:
    aim = math.log((1 - smoothing) / smoothing) / 0.1
    exo = partial(exo_pair_loss, beta=0.1, label_smoothing=smoothing)
    assert exo(one_pair(aim, 0.0)).values.item() == pytest.approx(0, abs=1e-12)
    for loss in (exo, partial(dpo_loss, beta=0.1, label_smoothing=smoothing)):
        assert slopes(loss, aim, 0.0) == pytest.approx((0, 0), abs=1e-12)
    for elsewhere in (aim - 3, aim + 3, -50.0, 200.0):
        assert exo(one_pair(elsewhere, 0.0)).values.item() > 1e-6


@pytest.mark.parametrize("rejected", [-20.0, 0.0, 20.0])
def test_nca_holds_the_chosen_reward_at_log_2_whatever_becomes_of_the_rejected_one(rejected: float) -> None:
    loss = partial(nca_pair_loss, beta=0.1)
    assert slopes(loss, math.log(2) / 0.1, rejected)[0] == pytest.approx(0, abs=1e-12)
    assert slopes(loss, 0.0, rejected)[0] < 0 < slopes(loss, 10.0, rejected)[0]
    assert slopes(loss, 0.0, rejected)[1] > 0


def test_sppo_is_content_half_an_inverse_beta_away_on_either_side() -> None:
    loss = partial(sppo_hard_loss, beta=0.1)
    assert loss(one_pair(5.0, -5.0)).values.item() == 0
    assert slopes(loss, 5.0, -5.0) == (0, 0)


def test_apo_down_starts_with_the_rejected_response_and_ends_by_lowering_the_chosen_one() -> None:
    loss = partial(apo_down_loss, beta=0.1)
    up, down = slopes(loss, 0.0, 0.0)
    assert up == pytest.approx(0, abs=1e-15) and down > 0
    assert slopes(loss, 10.0, -150.0)[0] > 0
    # apo_zero raises it, from the same start.
    assert slopes(partial(apo_zero_loss, beta=0.1), 0.0, 0.0)[0] < 0


def test_discopop_is_dpo_where_the_ranking_is_wrong_and_exponential_where_it_is_right() -> None:
    loss = partial(discopop_loss, beta=0.1)
    assert loss(one_pair(-30.0, 0.0)).values.item() == pytest.approx(dpo_loss(one_pair(-30.0, 0.0), beta=0.1).values)
    assert loss(one_pair(30.0, 0.0)).values.item() == pytest.approx(math.exp(-3))
    # The dip just below 0 that the docstring warns of: a minimum between higher values.
    at = [loss(one_pair(margin, 0.0)).values.item() for margin in (-3.0, -1.2, 0.0)]
    assert at[1] < at[0] and at[1] < at[2]


@given(ratios=st.tuples(st.floats(-20, 20), st.floats(-20, 20)))
@settings(deadline=None, max_examples=30)
def test_alpha_divergence_goes_from_forward_to_reverse_kl(ratios: tuple[float, float]) -> None:
    pair = one_pair(*ratios)
    alpha = partial(dpo_loss, beta=0.1, f_divergence="alpha_divergence")
    forward = dpo_loss(pair, beta=0.1, f_divergence="forward_kl").values
    torch.testing.assert_close(alpha(pair, f_alpha=0.0).values, forward)
    plain = dpo_loss(pair, beta=0.1).values
    torch.testing.assert_close(alpha(pair, f_alpha=1.0).values, plain, rtol=0, atol=0)
    torch.testing.assert_close(alpha(pair, f_alpha=1 - 2e-6).values, plain, rtol=1e-3, atol=1e-6)


def test_another_divergence_than_dpos_needs_its_reference() -> None:
    with pytest.raises(LossInputError, match="reference_free"):
        dpo_loss(one_pair(0.0, 0.0), beta=0.1, f_divergence="forward_kl", reference_free=True)


@pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
@given(ratios=st.tuples(log_ratios, log_ratios), smoothing=st.floats(0, 0.45))
@settings(deadline=None, max_examples=30)
def test_optimal_transport_of_one_pair_is_dpo(
    loss: Callable[..., LossValues], ratios: tuple[float, float], smoothing: float
) -> None:
    pair = one_pair(*ratios)
    expected = dpo_loss(pair, beta=0.1, label_smoothing=smoothing).values
    torch.testing.assert_close(loss(pair, beta=0.1, label_smoothing=smoothing).values, expected, rtol=1e-12, atol=0)


@given(chosen=log_ratios, rejected=log_ratios, drift=log_ratios)
@settings(deadline=None, max_examples=30)
def test_a_drift_that_all_rewards_share_moves_bco_only_if_nothing_shifts(
    chosen: float, rejected: float, drift: float
) -> None:
    there, here = one_pair(chosen, rejected), one_pair(chosen + drift, rejected + drift)
    loss = partial(bco_pair_loss, beta=0.1)
    torch.testing.assert_close(loss(here).values, loss(there).values, rtol=1e-9, atol=1e-9)
    if abs(drift) > 1:
        plain = partial(loss, reward_shift="none")
        assert plain(one_pair(drift, drift)).values > plain(one_pair(0.0, 0.0)).values


def test_a_mix_is_the_weighted_sum_of_its_parts_in_value_and_slope() -> None:
    pair = one_pair(3.0, -4.0)
    parts: list[tuple[float, str, PairLoss]] = [
        (0.8, "dpo", partial(dpo_loss, beta=0.3)),
        (0.2, "bco_pair", partial(bco_pair_loss, beta=0.3)),
        (0.5, "simpo", partial(simpo_loss, beta=2.0, gamma=0.7)),
        (1.0, "sft_ref", lambda pair: LossValues(-pair.policy_chosen / pair.chosen_tokens)),
    ]
    own = {"simpo": {"beta": 2.0, "gamma": 0.7}}
    mixed = partial(mix_loss, beta=0.3, losses=[{"loss": n, "weight": w, **own.get(n, {})} for w, n, _ in parts])
    result = mixed(pair)
    expected = torch.stack([weight * loss(pair).values for weight, _, loss in parts]).sum(0)
    torch.testing.assert_close(result.values, expected, rtol=1e-12, atol=0)
    for _, name, loss in parts:
        torch.testing.assert_close(result.parts[f"loss/{name}"], loss(pair).values)
    sums = [sum(weight * slopes(loss, 3.0, -4.0)[side] for weight, _, loss in parts[:3]) for side in (0, 1)]
    assert slopes(mixed, 3.0, -4.0) == pytest.approx((sums[0] - 1 / 20, sums[1]), rel=1e-12)
    assert result.rewards == dpo_loss(pair, beta=0.3).rewards


@given(permutation=st.permutations(range(6)))
@settings(deadline=None, max_examples=20)
def test_unpaired_transport_does_not_ask_who_stands_beside_whom(permutation: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    w, l_, rw, rl = (-torch.rand(6, dtype=torch.float64, generator=generator) * 40 for _ in range(4))
    tokens = torch.full((6,), 20.0).double()
    beside = aot_unpaired_loss(PairLogps(w, l_, rw, rl, tokens, tokens), beta=0.3).values
    elsewhere = PairLogps(w, l_[permutation], rw, rl[permutation], tokens, tokens)
    torch.testing.assert_close(aot_unpaired_loss(elsewhere, beta=0.3).values, beside)


@given(ratios=st.lists(log_ratios, min_size=2, max_size=2), beta=st.floats(0.01, 1))
@settings(deadline=None)
def test_plackett_luce_of_two_is_dpo(ratios: list[float], beta: float) -> None:
    pair = one_pair(*ratios)
    assert pair.reference_chosen is not None and pair.reference_rejected is not None

    def side_by_side(chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.stack([chosen, rejected], dim=1)

    ranked = RankedLogps(
        side_by_side(pair.policy_chosen, pair.policy_rejected),
        side_by_side(pair.reference_chosen, pair.reference_rejected),
        side_by_side(pair.chosen_tokens, pair.rejected_tokens),
        torch.ones(1, 2, dtype=torch.bool),
    )
    torch.testing.assert_close(
        plackett_luce_loss(ranked, beta=beta).values, dpo_loss(pair, beta=beta).values, rtol=1e-12, atol=1e-12
    )


@given(permutation=st.permutations(range(6)))
@settings(deadline=None, max_examples=20)
def test_the_order_of_a_batch_changes_no_value(permutation: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    columns = [-torch.rand(6, dtype=torch.float64, generator=generator) * 40 for _ in range(4)]
    columns += [torch.full((6,), 25.0).double(), torch.full((6,), 15.0).double()]
    for loss in PAIR_LOSSES.values():
        values = loss(PairLogps(*columns)).values
        torch.testing.assert_close(loss(PairLogps(*(c[permutation] for c in columns))).values, values[permutation])


def test_a_response_likelier_in_general_than_in_the_reference_moves_ktos_reference_point() -> None:
    policy = torch.zeros(2)
    unpaired = UnpairedLogps(policy, policy, torch.ones(2), torch.tensor([True, False]), policy + 4.0, policy)
    desirable, undesirable = kto_loss(unpaired, beta=1.0).values
    assert desirable == pytest.approx(1 / (1 + math.exp(-4))) and undesirable == pytest.approx(1 / (1 + math.exp(4)))
    # Drift the other way is not believed: a divergence is never negative.
    drifted = replace(unpaired, kl_policy=policy - 4.0)
    torch.testing.assert_close(kto_loss(drifted, beta=1.0).values, torch.tensor([0.5, 0.5]))


# --- numbers that break naive formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_log_probs_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    extremes = [0.0, -1e-12, -1e-3, -1.0, -100.0, -1e5]
    grid = torch.cartesian_prod(*[torch.tensor(extremes, dtype=dtype)] * 2)
    w, l_ = grid[:, 0].clone().requires_grad_(), grid[:, 1].clone().requires_grad_()
    ones = torch.ones_like(w)
    result = PAIR_LOSSES[name](PairLogps(w, l_, -50 * ones.detach(), -50 * ones.detach(), ones, 20 * ones))
    result.values.sum().backward()
    assert w.grad is not None and l_.grad is not None
    for tensor in (result.values, w.grad, l_.grad):
        assert tensor.isfinite().all()


def test_plackett_luce_stays_finite_when_a_reward_dwarfs_the_others() -> None:
    policy = torch.tensor([[0.0, -1e5, -1e-3], [-1e5, 0.0, float("nan")]], requires_grad=True)
    present = torch.tensor([[True, True, True], [True, True, False]])
    values = plackett_luce_loss(RankedLogps(policy, torch.zeros(2, 3), torch.ones(2, 3), present), beta=1.0).values
    (gradient,) = torch.autograd.grad(values.sum(), policy)
    assert values.isfinite().all() and gradient.isfinite().all() and gradient[1, 2] == 0


def test_the_tail_of_a_large_margin_keeps_its_digits() -> None:
    # -log sigmoid(40) = log(1 + e^-40); computed as log of a rounded sigmoid it would be 0.
    values = dpo_loss(one_pair(200.0, -200.0), beta=0.1).values
    assert values.item() == pytest.approx(math.log1p(math.exp(-40)), rel=1e-12) and values.item() > 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_missing_reference_is_an_error_that_says_what_to_do(name: str) -> None:
    bare = replace(one_pair(0.0, 0.0), reference_chosen=None, reference_rejected=None)
    with pytest.raises(LossInputError, match="reference") as error:
        WITH_REFERENCE[name](bare)
    assert error.value.hint and "loss=" in error.value.hint


def test_ranked_and_unpaired_losses_too_refuse_a_missing_reference() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(LossInputError):
        plackett_luce_loss(
            RankedLogps(zeros[:, None], None, zeros[:, None], torch.ones(2, 1, dtype=torch.bool)), beta=1
        )
    with pytest.raises(LossInputError):
        kto_loss(UnpairedLogps(zeros, None, zeros, zeros.bool(), zeros, zeros), beta=1)
    with pytest.raises(LossInputError):
        kto_loss(UnpairedLogps(zeros, zeros, zeros, zeros.bool(), zeros, None), beta=1)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_losses_without_a_reference_neither_need_nor_read_one(name: str) -> None:
    pair = one_pair(3.0, -2.0)
    bare = replace(pair, reference_chosen=None, reference_rejected=None)
    torch.testing.assert_close(WITHOUT_REFERENCE[name](bare).values, WITHOUT_REFERENCE[name](pair).values)


def test_a_reference_that_would_broadcast_is_refused() -> None:
    pair = one_pair(0.0, 0.0)
    assert pair.reference_chosen is not None
    with pytest.raises(LossInputError, match="shape"):
        dpo_loss(replace(pair, reference_chosen=pair.reference_chosen[:, None]), beta=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_exo_refuses_labels_that_are_certain_or_say_nothing(smoothing: float) -> None:
    with pytest.raises(LossInputError, match="label_smoothing"):
        exo_pair_loss(one_pair(0.0, 0.0), beta=0.1, label_smoothing=smoothing)


@pytest.mark.parametrize("flip", [-0.1, 0.5, 0.9])
def test_robust_dpo_refuses_a_share_of_flipped_labels_it_cannot_undo(flip: float) -> None:
    with pytest.raises(LossInputError, match="label_smoothing"):
        robust_dpo_loss(one_pair(0.0, 0.0), beta=0.1, label_smoothing=flip)
