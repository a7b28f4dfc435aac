"""Every loss and its gradient equal a float64 NumPy transcription of the paper's formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

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
from dpo_cli.losses.nca_pair import nca_pair_loss
from dpo_cli.losses.orpo import orpo_loss
from dpo_cli.losses.plackett_luce import plackett_luce_loss
from dpo_cli.losses.robust_dpo import robust_dpo_loss
from dpo_cli.losses.sft_ref import sft_ref_loss
from dpo_cli.losses.sigmoid_norm import sigmoid_norm_loss
from dpo_cli.losses.simpo import simpo_loss
from dpo_cli.losses.sppo_hard import sppo_hard_loss
from dpo_cli.losses.types import DemonstrationLogps, LossValues, PairLogps, RankedLogps, UnpairedLogps

Array = NDArray[np.float64]
Oracle = Callable[..., Array]


# --- oracles: the formulas of the papers, in terms of probabilities' logs, written without reading dpo_cli ------------


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


def dpo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    return -log_sigmoid(beta * (w - rw) - beta * (l_ - rl))


def cdpo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, eps: float) -> Array:
    right = dpo_oracle(w, l_, rw, rl, nw, nl, beta=beta)
    wrong = dpo_oracle(l_, w, rl, rw, nl, nw, beta=beta)
    return (1 - eps) * right + eps * wrong


def rpo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, alpha: float) -> Array:
    return dpo_oracle(w, l_, rw, rl, nw, nl, beta=beta) - alpha * w / nw


def average_dpo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    return dpo_oracle(w / nw, l_ / nl, rw / nw, rl / nl, nw, nl, beta=beta)


def reference_free_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    return -log_sigmoid(beta * w - beta * l_)


def f_dpo_oracle(
    w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, slope: Callable[[Array], Array]
) -> Array:
    """slope: f' of the divergence sum of reference * f(policy / reference)."""
    return -log_sigmoid(beta * slope(np.exp(w - rw)) - beta * slope(np.exp(l_ - rl)))


def rdpo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, eps: float) -> Array:
    right = dpo_oracle(w, l_, rw, rl, nw, nl, beta=beta)
    wrong = dpo_oracle(l_, w, rl, rw, nl, nw, beta=beta)
    return ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)


def ipo_sum_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, tau: float) -> Array:
    return ((w - l_) - (rw - rl) - 1 / (2 * tau)) ** 2


def ipo_mean_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, tau: float) -> Array:
    return ipo_sum_oracle(w / nw, l_ / nl, rw / nw, rl / nl, nw, nl, tau=tau)


def hinge_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    return np.maximum(0.0, 1.0 - beta * ((w - rw) - (l_ - rl)))


def apo_zero_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    return -sigmoid(beta * (w - rw)) + sigmoid(beta * (l_ - rl)) + 1.0


def apo_down_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    r_w, r_l = beta * (w - rw), beta * (l_ - rl)
    return sigmoid(r_w) - sigmoid(r_w - r_l) + 1.0


def exo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, eps: float) -> Array:
    # KL(p || q) over the two responses: p the softmax of the rewards, q = (1 - eps, eps).
    rewards = beta * np.stack([w - rw, l_ - rl])
    log_p = rewards - np.logaddexp(*rewards)
    log_q = np.log(np.array([[1 - eps], [eps]]))
    return (np.exp(log_p) * (log_p - log_q)).sum(0)


def nca_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    r_w, r_l = beta * (w - rw), beta * (l_ - rl)
    # The chosen response counts as data, and both, each with weight 1/2, as samples of the reference.
    return -(log_sigmoid(r_w) + (log_sigmoid(-r_w) + log_sigmoid(-r_l)) / 2)


def sppo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, eta: float) -> Array:
    # (log-ratio - eta (P(y wins) - 1/2))^2 with P = 1 and P = 0.
    return (w - rw - eta * (1 - 0.5)) ** 2 + (l_ - rl - eta * (0 - 0.5)) ** 2


def discopop_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float) -> Array:
    rho = beta * ((w - rw) - (l_ - rl))
    blend = sigmoid(rho / 0.05)
    return (1 - blend) * np.log(1 + np.exp(-rho)) + blend * np.exp(-rho)


def simpo_oracle(
    w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, gamma: float
) -> Array:
    return -log_sigmoid(beta / nw * w - beta / nl * l_ - gamma)


def cpo_oracle(
    w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, alpha: float, eps: float = 0.0
) -> Array:
    prefer = -(1 - eps) * log_sigmoid(beta * (w - l_)) - eps * log_sigmoid(beta * (l_ - w))
    return prefer - alpha * w / nw


def cpo_simpo_oracle(
    w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, beta: float, gamma: float, alpha: float
) -> Array:
    return simpo_oracle(w, l_, rw, rl, nw, nl, beta=beta, gamma=gamma) + alpha * -w / nw


def orpo_oracle(w: Array, l_: Array, rw: Array, rl: Array, nw: Array, nl: Array, *, lam: float) -> Array:
    # Extended precision: odds are a quotient of numbers near one.
    p_w, p_l = np.exp(w.astype(np.longdouble) / nw), np.exp(l_.astype(np.longdouble) / nl)
    log_odds_ratio = np.log((p_w / (1 - p_w)) / (p_l / (1 - p_l)))
    return (-w / nw + lam * np.logaddexp(0, -log_odds_ratio)).astype(np.float64)


PAIR_LOSSES = {
    "dpo": (partial(dpo_loss, beta=0.1), partial(dpo_oracle, beta=0.1)),
    "dpo, smoothed": (
        partial(dpo_loss, beta=0.3, label_smoothing=0.2),
        partial(cdpo_oracle, beta=0.3, eps=0.2),
    ),
    "dpo with nll": (partial(dpo_loss, beta=0.1, nll_alpha=0.7), partial(rpo_oracle, beta=0.1, alpha=0.7)),
    "dpo of averages": (partial(dpo_loss, beta=2.0, average_logps=True), partial(average_dpo_oracle, beta=2.0)),
    "dpo, reference-free": (
        partial(dpo_loss, beta=0.05, reference_free=True),
        partial(reference_free_oracle, beta=0.05),
    ),
    "dpo, forward_kl": (
        partial(dpo_loss, beta=0.3, f_divergence="forward_kl"),
        partial(f_dpo_oracle, beta=0.3, slope=lambda u: -1 / u),
    ),
    "dpo, js_divergence": (
        partial(dpo_loss, beta=0.3, f_divergence="js_divergence"),
        partial(f_dpo_oracle, beta=0.3, slope=lambda u: np.log(2 * u / (1 + u))),
    ),
    "dpo, alpha_divergence": (
        partial(dpo_loss, beta=0.3, f_divergence="alpha_divergence", f_alpha=0.7),
        partial(f_dpo_oracle, beta=0.3, slope=lambda u: (1 - u ** -(1 - 0.7)) / (1 - 0.7)),
    ),
    "robust_dpo": (
        partial(robust_dpo_loss, beta=0.3, label_smoothing=0.15),
        partial(rdpo_oracle, beta=0.3, eps=0.15),
    ),
    "ipo": (partial(ipo_loss, beta=0.2), partial(ipo_mean_oracle, tau=0.2)),
    "ipo of sums": (partial(ipo_loss, beta=0.2, average_logps=False), partial(ipo_sum_oracle, tau=0.2)),
    "hinge": (partial(hinge_loss, beta=0.1), partial(hinge_oracle, beta=0.1)),
    "apo_zero": (partial(apo_zero_loss, beta=0.1), partial(apo_zero_oracle, beta=0.1)),
    "apo_down": (partial(apo_down_loss, beta=0.1), partial(apo_down_oracle, beta=0.1)),
    "exo_pair": (partial(exo_pair_loss, beta=0.1, label_smoothing=0.02), partial(exo_oracle, beta=0.1, eps=0.02)),
    "nca_pair": (partial(nca_pair_loss, beta=0.1), partial(nca_oracle, beta=0.1)),
    "sppo_hard": (partial(sppo_hard_loss, beta=0.1), partial(sppo_oracle, eta=10.0)),
    "discopop": (partial(discopop_loss, beta=0.05), partial(discopop_oracle, beta=0.05)),
    "sigmoid_norm": (partial(sigmoid_norm_loss, beta=5.0), partial(average_dpo_oracle, beta=5.0)),
    "simpo": (partial(simpo_loss, beta=2.5, gamma=1.2), partial(simpo_oracle, beta=2.5, gamma=1.2)),
    "simpo with nll": (
        partial(simpo_loss, beta=2.5, gamma=1.2, nll_alpha=0.7),
        partial(cpo_simpo_oracle, beta=2.5, gamma=1.2, alpha=0.7),
    ),
    "cpo": (partial(cpo_loss, beta=0.1), partial(cpo_oracle, beta=0.1, alpha=1.0)),
    "cpo, smoothed": (
        partial(cpo_loss, beta=0.1, nll_alpha=0.4, label_smoothing=0.2),
        partial(cpo_oracle, beta=0.1, alpha=0.4, eps=0.2),
    ),
    "orpo": (partial(orpo_loss, beta=0.3), partial(orpo_oracle, lam=0.3)),
}


# --- inputs: lengths up to 300 tokens, 0.01 to 6 nats a token, log-ratios up to 40 nats ------------------------------


@st.composite
def logps(draw: st.DrawFn, shape: int | tuple[int, ...]) -> tuple[Array, Array, Array]:
    """(policy, reference, tokens) of responses."""
    tokens = draw(hnp.arrays(np.float64, shape, elements=st.integers(1, 300)))
    per_token = draw(hnp.arrays(np.float64, shape, elements=st.floats(0.01, 6)))
    ratio = draw(hnp.arrays(np.float64, shape, elements=st.floats(-40, 40)))
    return -tokens * per_token, -tokens * per_token - ratio, tokens


@st.composite
def pairs(draw: st.DrawFn) -> list[Array]:
    n = draw(st.integers(1, 4))
    (w, rw, nw), (l_, rl, nl) = draw(logps(n)), draw(logps(n))
    return [w, l_, rw, rl, nw, nl]


def nearer(name: str, batch: list[Array]) -> list[Array]:
    """Divergences of exponentials of the log-ratio: within 4 nats, where differences still measure a slope."""
    if "_kl" not in name and "alpha_divergence" not in name:
        return batch
    w, l_, rw, rl, nw, nl = batch
    return [w, l_, w - (w - rw) / 10, l_ - (l_ - rl) / 10, nw, nl]


def differentiate(oracle: Callable[[Array], Array], at: Array) -> Array:
    """d (sum of values) / d each entry of `at`, by central differences."""
    step = 1e-5
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        # Difference of the values first, then their sum: large values of other examples would eat the digits.
        gradient[index] = (oracle(up) - oracle(down)).sum() / (2 * step)
    return gradient


def assert_values_and_gradients(result: LossValues, expected: Array, leaves: dict[Any, Array]) -> None:
    np.testing.assert_allclose(result.values.detach().numpy(), expected, rtol=1e-11, atol=1e-12)
    gradients = torch.autograd.grad(result.values.sum(), list(leaves), allow_unused=True)
    for gradient, numeric in zip(gradients, leaves.values(), strict=True):
        np.testing.assert_allclose(
            np.zeros_like(numeric) if gradient is None else gradient.numpy(), numeric, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("name", PAIR_LOSSES)
@given(batch=pairs())
@settings(max_examples=40, deadline=None)
def test_pair_losses_and_their_gradients_are_those_of_the_papers(name: str, batch: list[Array]) -> None:
    loss, oracle = PAIR_LOSSES[name]
    batch = nearer(name, batch)
    if name == "hinge" and (abs(oracle(*batch)) < 1e-4).any():
        return  # no derivative at the kink
    w, l_ = (torch.from_numpy(side).requires_grad_() for side in batch[:2])
    result = loss(PairLogps(w, l_, *map(torch.from_numpy, batch[2:])))
    numeric = {
        w: differentiate(lambda x: oracle(x, *batch[1:]), batch[0]),
        l_: differentiate(lambda x: oracle(batch[0], x, *batch[2:]), batch[1]),
    }
    assert_values_and_gradients(result, oracle(*batch), numeric)


@given(batch=pairs(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_weights_are_constants_before_the_preference_alone(batch: list[Array], data: st.DataObject) -> None:
    w, l_, rw, rl, nw, nl = batch
    # Of each token, a sum of squared probabilities between 0.01 and 1.
    squared = data.draw(hnp.arrays(np.float64, (len(w), 2), elements=st.floats(0.01, 1)))
    logs = np.log(squared) * np.stack([nw, nl], axis=1)
    chosen, rejected = torch.from_numpy(w).requires_grad_(), torch.from_numpy(l_).requires_grad_()
    pair = PairLogps(
        chosen, rejected, *map(torch.from_numpy, batch[2:]), {"log_sum_squared_probs": torch.from_numpy(logs)}
    )

    result = dpo_loss(pair, beta=0.1, nll_alpha=0.7, use_weighting=True)

    # The geometric mean of each response's p / sum of p^2.
    weights = np.exp(w / nw) / squared[:, 0] * np.exp(l_ / nl) / squared[:, 1]

    def oracle(w: Array, l_: Array) -> Array:
        return weights * dpo_oracle(w, l_, rw, rl, nw, nl, beta=0.1) - 0.7 * w / nw

    np.testing.assert_allclose(result.parts["weights"].numpy(), weights, rtol=1e-11)
    numeric = {
        chosen: differentiate(lambda x: oracle(x, l_), w),
        rejected: differentiate(lambda x: oracle(w, x), l_),
    }
    np.testing.assert_allclose(result.values.detach().numpy(), oracle(w, l_), rtol=1e-11)
    found = torch.autograd.grad(result.values.sum(), list(numeric))
    for slope, expected in zip(found, numeric.values(), strict=True):
        np.testing.assert_allclose(slope.numpy(), expected, rtol=1e-5, atol=1e-7 * max(1, weights.max()))


def test_a_policy_that_samples_evenly_among_a_few_tokens_has_the_weight_one() -> None:
    # p = 1/4 and the sum of its squares 1/4, at each of 5 and of 9 tokens.
    quarter = torch.tensor([[5.0, 9.0]]).double() * np.log(0.25)
    w, l_ = quarter[:, 0], quarter[:, 1]
    pair = PairLogps(w, l_, w, l_, w * 0 + 5, l_ * 0 + 9, {"log_sum_squared_probs": quarter})
    result = dpo_loss(pair, beta=0.1, use_weighting=True)
    torch.testing.assert_close(result.parts["weights"], torch.ones(1).double())
    torch.testing.assert_close(result.values, dpo_loss(pair, beta=0.1).values)


def plackett_luce_oracle(policy: Array, reference: Array, counts: list[int], *, beta: float) -> Array:
    values = []
    for p, r, count in zip(policy, reference, counts, strict=True):
        reward = beta * (p - r)[:count]
        values.append(-sum(reward[k] - np.logaddexp.reduce(reward[k:]) for k in range(count)))
    return np.array(values)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_plackett_luce_and_its_gradient_ignore_what_is_absent(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 5))
    policy, reference, tokens = data.draw(logps((n, k)))
    counts = [data.draw(st.integers(2, k)) for _ in range(n)]
    present = torch.arange(k) < torch.tensor(counts)[:, None]
    # What stands in absent places must not matter at all: the worst there is.
    hole = ~present.numpy()
    torch_policy = torch.from_numpy(np.where(hole, np.nan, policy)).requires_grad_()
    torch_reference = torch.from_numpy(np.where(hole, np.inf, reference))

    result = plackett_luce_loss(RankedLogps(torch_policy, torch_reference, torch.from_numpy(tokens), present), beta=0.2)

    numeric = differentiate(lambda x: plackett_luce_oracle(x, reference, counts, beta=0.2), policy)
    assert_values_and_gradients(
        result, plackett_luce_oracle(policy, reference, counts, beta=0.2), {torch_policy: numeric}
    )
    assert isinstance(result.rewards, torch.Tensor)
    np.testing.assert_allclose(result.rewards.numpy(), np.where(hole, 0, 0.2 * (policy - reference)), atol=1e-12)


def kto_oracle(p: Array, r: Array, desirable: Array, kl: float, *, beta: float, d: float, u: float) -> Array:
    z0 = max(0.0, kl)
    v = np.where(desirable, d * sigmoid(beta * (p - r - z0)), u * sigmoid(beta * (z0 - (p - r))))
    return np.where(desirable, d, u) - v


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_kto_holds_its_reference_point_constant(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 5))
    (p, r, tokens), (kp, kr, _) = data.draw(logps(n)), data.draw(logps(n))
    desirable = data.draw(hnp.arrays(np.bool_, n))
    kl = float((kp - kr).mean())
    oracle = partial(kto_oracle, r=r, desirable=desirable, kl=kl, beta=0.1, d=1.3, u=0.8)
    policy, kl_policy = torch.from_numpy(p).requires_grad_(), torch.from_numpy(kp).requires_grad_()
    unpaired = UnpairedLogps(policy, *map(torch.from_numpy, (r, tokens, desirable)), kl_policy, torch.from_numpy(kr))

    result = kto_loss(unpaired, beta=0.1, desirable_weight=1.3, undesirable_weight=0.8)

    assert_values_and_gradients(result, oracle(p), {policy: differentiate(oracle, p), kl_policy: np.zeros_like(kp)})
    np.testing.assert_allclose(result.parts["kl"].numpy(), np.full(n, max(0.0, kl)), atol=1e-10)


def aot_oracle(w: Array, l_: Array, rw: Array, rl: Array, *, beta: float, eps: float) -> float:
    gap = beta * (np.sort(w - l_) - np.sort(rw - rl))
    return float((-(1 - eps) * log_sigmoid(gap) - eps * log_sigmoid(-gap)).mean())


def aot_unpaired_oracle(w: Array, l_: Array, rw: Array, rl: Array, *, beta: float, eps: float) -> float:
    gap = beta * (np.sort(w - rw) - np.sort(l_ - rl))
    return float((-(1 - eps) * log_sigmoid(gap) - eps * log_sigmoid(-gap)).mean())


@pytest.mark.parametrize(("loss", "oracle"), [(aot_loss, aot_oracle), (aot_unpaired_loss, aot_unpaired_oracle)])
@given(data=st.data(), eps=st.sampled_from([0.0, 0.2]))
@settings(max_examples=60, deadline=None)
def test_optimal_transport_compares_sorted_columns(
    loss: Callable[..., LossValues], oracle: Callable[..., float], data: st.DataObject, eps: float
) -> None:
    n = data.draw(st.integers(1, 6))
    (w, rw, nw), (l_, rl, nl) = data.draw(logps(n)), data.draw(logps(n))
    sorted_by = (np.sort(w - l_), np.sort(rw - rl), np.sort(w - rw), np.sort(l_ - rl))
    if any((np.diff(column) < 1e-3).any() for column in sorted_by):
        return  # where two change places there is no derivative
    chosen, rejected = torch.from_numpy(w).requires_grad_(), torch.from_numpy(l_).requires_grad_()

    result = loss(PairLogps(chosen, rejected, *map(torch.from_numpy, (rw, rl, nw, nl))), beta=0.1, label_smoothing=eps)

    mean = result.values.mean()
    assert mean.item() == pytest.approx(oracle(w, l_, rw, rl, beta=0.1, eps=eps), rel=1e-11, abs=1e-12)
    found = torch.autograd.grad(mean, (chosen, rejected))
    for place in range(n):
        step = np.eye(n)[place] * 1e-5
        for slope, up, down in ((found[0], (w + step, l_), (w - step, l_)), (found[1], (w, l_ + step), (w, l_ - step))):
            ends = [oracle(*side, rw, rl, beta=0.1, eps=eps) for side in (up, down)]
            assert slope[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


def bco_oracle(w: Array, l_: Array, rw: Array, rl: Array, *, beta: float, shift: float) -> Array:
    return -log_sigmoid(beta * (w - rw) - shift) - log_sigmoid(-(beta * (l_ - rl) - shift))


@pytest.mark.parametrize("shifted", [True, False])
@given(batch=pairs())
@settings(max_examples=60, deadline=None)
def test_bco_holds_its_shift_constant(shifted: bool, batch: list[Array]) -> None:
    w, l_, rw, rl, *_ = batch
    # The paper's delta: half the mean reward of the chosen and half that of the rejected responses.
    shift = 0.2 * float((w - rw).mean() + (l_ - rl).mean()) / 2 if shifted else 0.0
    oracle = partial(bco_oracle, rw=rw, rl=rl, beta=0.2, shift=shift)
    chosen, rejected = torch.from_numpy(w).requires_grad_(), torch.from_numpy(l_).requires_grad_()

    result = bco_pair_loss(
        PairLogps(chosen, rejected, *map(torch.from_numpy, batch[2:])),
        beta=0.2,
        reward_shift="batch_mean" if shifted else "none",
    )

    numeric = {
        chosen: differentiate(lambda x: oracle(x, l_), w),
        rejected: differentiate(lambda x: oracle(w, x), l_),
    }
    assert_values_and_gradients(result, oracle(w, l_), numeric)
    np.testing.assert_allclose(result.parts["reward_shift"].numpy(), np.full(len(w), shift), atol=1e-12)


def test_sft_ref_is_the_mean_cross_entropy_once_divided_by_tokens() -> None:
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(7)
    per_token = logits.log_softmax(-1)[torch.arange(7), targets]
    # Two responses, of 3 and of 4 tokens.
    demo = DemonstrationLogps(torch.stack([per_token[:3].sum(), per_token[3:].sum()]), torch.tensor([3.0, 4.0]))
    loss = sft_ref_loss(demo).values.sum() / demo.tokens.sum()
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "alpha"), [("cpo", 1.0), ("simpo with nll", 0.7)])
def test_imitation_is_a_part_beside_the_preference(name: str, alpha: float) -> None:
    pair = PairLogps(*(torch.tensor([value]).double() for value in (-9.0, -20.0, -10.0, -19.0, 6.0, 8.0)))
    result = PAIR_LOSSES[name][0](pair)
    torch.testing.assert_close(result.parts["loss/nll"], torch.tensor([9.0 / 6.0]).double())
    preference = result.parts[f"loss/{name.split()[0]}"]
    torch.testing.assert_close(result.values, preference + alpha * result.parts["loss/nll"])


@pytest.mark.parametrize("name", ["dpo with nll", "orpo"])
def test_parts_are_the_terms_that_the_loss_is_made_of(name: str) -> None:
    loss = PAIR_LOSSES[name][0]
    pair = PairLogps(*(torch.tensor([value]).double() for value in (-9.0, -20.0, -10.0, -19.0, 6.0, 8.0)))
    result = loss(pair)
    nll = result.parts["loss/nll"]
    torch.testing.assert_close(nll, torch.tensor([9.0 / 6.0]).double())
    if name == "orpo":
        torch.testing.assert_close(result.values, nll + 0.3 * result.parts["loss/odds_ratio"])
    else:
        torch.testing.assert_close(result.values, result.parts["loss/dpo"] + 0.7 * nll)
        torch.testing.assert_close(result.parts["loss/dpo"], dpo_loss(pair, beta=0.1).values)
