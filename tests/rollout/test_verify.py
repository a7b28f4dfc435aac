"""A response is right exactly when its verifier's documentation says so."""

from __future__ import annotations

import json
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.errors import ConfigError, DataError
from dpo_cli.rollout.questions import QuestionSettings, read_questions
from dpo_cli.rollout.verify import extract_answer, last_number, verifier_of

GSM8K = {"train.jsonl": 7473, "test.jsonl": 1319}
WORKED = "She buys 3 boxes at $400.\n3*400=<<3*400=1200>>1200\n#### 1,200"


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
def test_the_answer_is_the_number_after_the_last_four_hashes(text: str, number: str | None) -> None:
    assert extract_answer(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("3*400=1200\n#### 1200", True, True),
        ("#### $1,200.00", True, True),
        ("#### 1200 dollars for 3 boxes", True, True),
        ("####1200", True, True),
        ("#### 1 #### 1200", True, True),
        ("#### 1200 #### 1", False, False),
        ("The answer is 1,200.", False, True),
        ("The answer is **$1,200**.", False, True),
        ("It costs $1200 for 3 boxes", False, False),
        ("#### none, that is 1200", False, True),
        ("#### 12000", False, False),
        ("#### -1200", False, False),
        ("twelve hundred", False, False),
        ("", False, False),
    ],
)
def test_gsm8k_answers(response: str, strict: bool, flexible: bool) -> None:
    assert verifier_of("gsm8k").is_right(response, WORKED, where="row 1") is strict
    assert verifier_of("gsm8k_flexible").is_right(response, WORKED, where="row 1") is flexible


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("between 3 and 4.5", "4.5"), ("minus -7", "-7"), ("ends with 12.", "12"), (".5", "0.5"),
        ("v2 of x1", None), ("10% off $1,200.", "1200"), ("3-4", "4"), ("no digits", None),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else str(found.normalize() if "." in str(found) else found)) == number


@given(st.integers(-(10**9), 10**9))
def test_a_number_is_itself_however_it_is_written(number: int) -> None:
    gsm8k = verifier_of("gsm8k")
    for written in (f"{number}", f"{number:,}", f"{number}.00", f"{number:,} units"):
        assert gsm8k.is_right(f"#### {written}", str(number), where="row 1")
    assert not gsm8k.is_right(f"#### {number + 1}", str(number), where="row 1")


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        ("Paris", "paris", True), ("  Paris\n", "Paris", True), ("New\u00a0 York", "new york", True),
        ("\ufb01ne", "Fine", True),
        ("Paris.", "Paris", False), ("Paris, France", "Paris", False), ("", "Paris", False),
    ],
)  # fmt: skip
def test_exact_answers(response: str, truth: str, right: bool) -> None:
    assert verifier_of("exact").is_right(response, truth, where="row 1") is right


def test_equal_numbers_vote_together() -> None:
    gsm8k = verifier_of("gsm8k")
    assert {gsm8k.answer(text) for text in ("#### 18", "#### $18.00", "#### 018 apples")} == {"18"}
    assert gsm8k.answer("eighteen") is None


@pytest.mark.parametrize("truth", ["twelve", "12 or 13", ""])
def test_a_truth_without_a_number_is_refused_by_row(truth: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl row 7"):
        verifier_of("gsm8k").check_truth(truth, where="a.jsonl row 7")


def test_a_missing_truth_is_refused_by_row() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl row 7"):
        verifier_of("exact").check_truth(None, where="a.jsonl row 7")


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checks.py").write_text(
        "def ends_alike(response: str, truth: str) -> bool:\n    return response[-1] == truth[-1]\n\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_checks", raising=False)


@pytest.mark.usefixtures("users_module")
def test_a_function_of_the_users_decides() -> None:
    verifier = verifier_of("my_checks.ends_alike")
    assert verifier.is_right("abc", "c", where="row 1")
    assert not verifier.is_right("abd", "c", where="row 1")


@pytest.mark.usefixtures("users_module")
def test_a_function_that_fails_is_reported_with_the_row() -> None:
    with pytest.raises(DataError, match="IndexError") as caught:
        verifier_of("my_checks.ends_alike").is_right("", "c", where="a.jsonl row 3")
    assert "a.jsonl row 3" in str(caught.value)


@pytest.mark.usefixtures("users_module")
@pytest.mark.parametrize("name", ["my_checks.absent", "no_such_module.f", "my_checks.number"])
def test_a_function_that_is_not_there_is_a_configuration_error(name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        verifier_of(name)


@pytest.mark.parametrize(("name", "mark"), [("gsm8k", "\n#### "), ("gsm8k_flexible", "\nA: ")])
def test_verdicts_are_those_published_with_gsm8ks_model_solutions(real_data: Path, name: str, mark: str) -> None:
    verifier = verifier_of(name)
    counted: Counter[tuple[bool, bool]] = Counter()
    for line in (real_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        truth = entry["ground_truth"].rpartition("A: ")[2]
        for solution in entry.values():
            if isinstance(solution, dict):
                response = solution["solution"].replace("\nA: ", mark)
                counted[verifier.is_right(response, truth, where="row"), solution["is_correct"]] += 1
    assert counted == {(True, True): 2001, (False, False): 3275}


def test_every_question_of_gsm8k_reads_with_its_truth(real_data: Path) -> None:
    settings = QuestionSettings(verifier=verifier_of("gsm8k"))
    sizes = {name: len(read_questions(str(real_data / "gsm8k" / name), settings).questions) for name in GSM8K}
    assert sizes == GSM8K
