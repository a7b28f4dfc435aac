"""The surface of a run's loss against the formula of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.report.loss_view import LossView


def view_of(*words: str) -> LossView | None:
    return LossView.of(check(compose(Request(words, None, "config"))).as_dict())


def grid() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.meshgrid(np.linspace(-3, 2, 6), np.linspace(-4, 1, 5)))  # type: ignore[return-value]


def surface(view: LossView, **changes: Any) -> Any:
    given = {"start": np.array([-12.0, -9.0]), "has_reference": True, "tokens": np.array([6.0, 4.0])} | changes
    return view.surface(*grid(), **given)


def test_dpo_and_its_slopes_are_those_of_the_paper() -> None:
    view = view_of("loss=dpo", "loss.beta=0.7")
    assert view is not None
    found, (x1, x2) = surface(view), grid()
    margin = 0.7 * (x1 - x2)
    np.testing.assert_allclose(found.values, np.log1p(np.exp(-margin)), rtol=1e-12)
    slope = -0.7 / (1 + np.exp(margin))
    np.testing.assert_allclose(found.slope_chosen, slope, rtol=1e-12)
    np.testing.assert_allclose(found.slope_rejected, -slope, rtol=1e-12)


def test_simpo_is_of_log_probs_a_token_from_where_the_run_began() -> None:
    view = view_of("loss=simpo", "loss.beta=2.5", "loss.gamma=0.5")
    assert view is not None
    found, (x1, x2) = surface(view, has_reference=False), grid()
    margin = 2.5 * ((x1 - 12) / 6 - (x2 - 9) / 4)
    np.testing.assert_allclose(found.values, np.log1p(np.exp(0.5 - margin)), rtol=1e-9)
    margins = view.margins(np.array([-6.0]), np.array([-8.0]), None, np.array([[6.0], [4.0]]))
    assert margins == pytest.approx(2.5 * (-1 + 2))


def test_a_loss_of_the_whole_batch_has_no_surface_and_one_without_pairs_no_view() -> None:
    coupled = view_of("loss=aot")
    assert coupled is not None
    assert surface(coupled) is None
    assert coupled.margins(np.zeros(3), -np.ones(3), np.zeros((2, 3)), np.ones((2, 3))) == pytest.approx(
        np.full(3, 0.1)
    )
    assert view_of("loss=kto") is None
    assert view_of("loss=sft_ref") is None
