"""The learning rate is what its name says at every step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.train.schedule import learning_rate

COMMON = {"peak": 2.0, "warmup_steps": 10, "total_steps": 110, "final_fraction": 0.1}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warmup_rises_linearly_and_the_first_step_already_moves(schedule) -> None:
    rates = [learning_rate(step, schedule=schedule, **COMMON) for step in range(10)]
    assert rates == pytest.approx([0.2 * (step + 1) for step in range(10)])


def test_each_schedule_at_known_points() -> None:
    assert learning_rate(60, schedule="linear", **COMMON) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate(60, schedule="cosine", **COMMON) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert learning_rate(35, schedule="cosine", **COMMON) == pytest.approx(
        2 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    )
    assert learning_rate(110, schedule="linear", **COMMON) == pytest.approx(0.2)
    assert learning_rate(109, schedule="constant", **COMMON) == 2


@given(st.sampled_from(["linear", "cosine", "constant"]), st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_it_is_never_negative_above_the_peak_or_rising_after_warmup(schedule, warmup, total, fraction) -> None:
    rates = [
        learning_rate(
            step, schedule=schedule, peak=1.0, warmup_steps=warmup, total_steps=total, final_fraction=fraction
        )
        for step in range(total)
    ]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
