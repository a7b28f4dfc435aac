"""Curves in one line of text."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.train.sparkline import ASCII_BLOCKS, BLOCKS, Curve, sparkline


def test_the_lowest_is_the_lowest_block_and_the_highest_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == BLOCKS
    assert sparkline([3, -1], 8) == "█▁"
    assert sparkline([0, 7], 8, blocks=ASCII_BLOCKS) == "_@"


def test_more_values_than_fit_are_averaged_over_equal_stretches() -> None:
    assert sparkline([0, 0, 4, 4, 7, 7], 3) == sparkline([0, 4, 7], 3)
    assert len(sparkline(range(1000), 40)) == 40


def test_a_flat_curve_lies_in_the_middle_and_what_is_not_finite_is_a_gap() -> None:
    assert set(sparkline([2.5] * 4, 4)) == {"▅"}
    assert sparkline([0, math.nan, 7, math.inf], 4) == "▁ █ "
    assert sparkline([math.nan], 4) == " "
    assert sparkline([], 4) == ""


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300), st.integers(1, 60))
def test_any_values_fit_any_width(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) == min(len(values), width)
    assert set(drawn) <= {*BLOCKS, " "}


def test_a_long_curve_keeps_its_shape_in_few_points() -> None:
    curve = Curve(most=16)
    for value in range(1000):
        curve.add(value)
    assert 8 <= len(curve.points) < 16
    assert curve.points == sorted(curve.points)
    assert curve.points[0] < 64 and curve.points[-1] > 900
