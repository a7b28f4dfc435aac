from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pytest

from dpo_cli.errors import DataError
from dpo_cli.rollout.exact_match import extract_answer, load_problems, paired_difference


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12+7=19\n#### 19", "19"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### $18", "18"),
        ("#### -$18", "-18"),
        ("####7 apples", "7"),
        ("#### 18.00", "18"),
        ("#### .5", "0.5"),
        ("#### 4.", "4"),
        ("#### 1 then #### 2", "2"),
        ("#### 007", "7"),
        ("the answer is 19", None),
        ("#### nineteen", None),
        ("#### 19 #### ", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_answer_is_the_number_after_the_last_four_hashes(text, number):
    assert extract_answer(text) == (None if number is None else Decimal(number))


def test_problems_load_with_answers_as_numbers_or_worked_solutions(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [
        {"prompt": "a", "answer": 5},
        {"prompt": "b", "answer": "1,000"},
        {"prompt": "c", "answer": "2+2=4\n#### 4"},
        {"prompt": "d", "answer": 2.5, "more": "is ignored"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert [problem.answer for problem in load_problems(path)] == [Decimal(n) for n in ("5", "1000", "4", "2.5")]
    assert [problem.prompt for problem in load_problems(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b'{"prompt": "a", "answer": 5', ["JSON", "row 2", "column"]),
        (b"[1, 2]", ["object", "row 2"]),
        (b'{"prompt": "a"}', ["'answer' is missing", "row 2"]),
        (b'{"question": "a", "answer": 5}', ["'prompt' is missing", "row 2", "question"]),
        (b'{"prompt": "", "answer": 5}', ["'prompt'", "empty", "row 2"]),
        (b'{"prompt": ["a"], "answer": 5}', ["'prompt'", "text", "row 2"]),
        (b'{"prompt": "a", "answer": "twelve"}', ["no number", "twelve", "row 2"]),
        (b'{"prompt": "a", "answer": "12 or 13"}', ["no number", "row 2"]),
        (b'{"prompt": "a", "answer": true}', ["no number", "row 2"]),
        (b'{"prompt": "a", "answer": null}', ["no number", "row 2"]),
        (b'{"prompt": "\xff", "answer": 5}', ["UTF-8"]),
    ],
)
def test_a_malformed_problem_is_an_error_that_names_file_row_and_field(tmp_path, row, words):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'{"prompt": "fine", "answer": 1}\n' + row + b"\n")
    with pytest.raises(DataError) as caught:
        load_problems(path)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_a_missing_or_empty_problems_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        load_problems(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no problems"):
        load_problems(tmp_path / "empty.jsonl")


def test_the_gain_is_the_difference_of_the_accuracies():
    before = np.array([True, True, False, False, False])
    after = np.array([True, False, True, True, False])
    difference = paired_difference(before, after)
    assert difference.before_mean == 0.4
    assert difference.after_mean == 0.6
    assert difference.gain == pytest.approx(0.2)
    assert difference.low < 0.2 < difference.high


def test_swapping_before_and_after_negates_the_interval():
    draw = np.random.default_rng(0)
    before, after = draw.random(300) < 0.5, draw.random(300) < 0.6
    there, back = paired_difference(before, after), paired_difference(after, before)
    assert (back.gain, back.low, back.high) == pytest.approx((-there.gain, -there.high, -there.low))


def test_no_change_gives_an_interval_around_zero_that_is_not_empty():
    same = np.array([True] * 10 + [False] * 10)
    difference = paired_difference(same, same)
    assert difference.gain == 0
    assert difference.low < 0 < difference.high


@pytest.mark.parametrize("problems", [50, 2000])
@pytest.mark.parametrize(("gained", "lost"), [(0.12, 0.05), (0.02, 0.02), (0.3, 0.1)])
def test_the_interval_covers_the_true_gain_in_about_95_of_100_experiments(problems, gained, lost):
    draw = np.random.default_rng(1)
    experiments = 2000
    covered = 0
    for _ in range(experiments):
        u = draw.random(problems)
        before = (u < lost) | (u > 0.6)
        after = ((u >= lost) & (u < lost + gained)) | (u > 0.6)
        difference = paired_difference(before, after)
        covered += difference.low <= gained - lost <= difference.high
    # 0.936: three standard errors of a simulated coverage below 95%. Being too wide is allowed where changes are rare.
    assert covered / experiments > 0.936
    if problems * min(gained, lost) > 30:
        assert covered / experiments < 0.964
