from __future__ import annotations

import re
from itertools import pairwise

import pytest

from dpo_cli.data.arithmetic import SPLITS, Problem, problem_stream, problems, split_of

SAMPLE = [problem for split in SPLITS for problem in problems(split, seed=0, count=500)]
GAIN = re.compile(r"(\w+) (?:buys|finds|gets) (\d+) more")
LOSS = re.compile(r"(\w+) (?:gives away|loses|sells) (\d+)")
MULTIPLE = re.compile(r"(\w+) now has (\d+) times as many")


def read_and_calculate(prompt: str) -> int:
    """A reader's answer, from the words alone: who is asked about, what they have, what happens to them."""
    *told, question = re.split(r"(?<=[.?])\s", prompt.strip())
    thing, person = re.fullmatch(r"How many (\w+) does (\w+) have now\?", question).groups()
    total = None
    for sentence in told:
        if started := re.fullmatch(rf"{person} has (\d+) {thing}\.", sentence):
            total = int(started[1])
        for pattern, change in (
            (GAIN, lambda had, n: had + n),
            (LOSS, lambda had, n: had - n),
            (MULTIPLE, lambda had, n: had * n),
        ):
            if (event := pattern.fullmatch(sentence.removesuffix("."))) and event[1] == person:
                total = change(total, int(event[2]))
    return total


def test_the_answer_is_what_a_reader_of_the_words_calculates():
    for problem in SAMPLE:
        assert read_and_calculate(problem.prompt) == int(problem.answer), problem.prompt


def test_every_line_of_a_worked_solution_is_true_and_begins_where_the_last_one_ended():
    for problem in SAMPLE:
        *lines, last = problem.solution.split("\n")
        steps = [re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups() for line in lines]
        for left, symbol, right, result in steps:
            expected = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[symbol]
            assert int(result) == expected
            assert 1 <= int(result) <= 99
        assert all(before[3] == after[0] for before, after in pairwise(steps))
        assert last == f"#### {steps[-1][3]}" == f"#### {problem.answer}"


def test_about_half_of_the_problems_tell_something_that_does_not_matter():
    events = [problem.solution.count("\n") for problem in SAMPLE]
    distracted = [problem.prompt.count(". ") + 1 > count + 2 for problem, count in zip(SAMPLE, events, strict=True)]
    # 2,000 draws at one half: four standard errors are 4.5 points.
    assert abs(sum(distracted) / len(distracted) - 0.5) < 0.045


def test_the_same_seed_tells_the_same_problems_and_another_seed_others():
    assert problems("test", seed=3, count=50) == problems("test", seed=3, count=50)
    assert problems("test", seed=3, count=80)[:50] == problems("test", seed=3, count=50)
    assert not set(problems("test", seed=3, count=50)) & set(problems("test", seed=4, count=50))


def test_no_problem_appears_twice_in_a_split():
    prompts = [problem.prompt for problem in problems("demonstrations", seed=0, count=3000)]
    assert len(set(prompts)) == len(prompts)


def test_a_text_has_one_split_whatever_the_seed_so_that_no_test_problem_can_be_trained_on():
    for split in SPLITS:
        for seed in range(3):
            assert {split_of(problem.prompt) for problem in problems(split, seed=seed, count=100)} == {split}


def test_problems_do_not_change_between_machines_and_versions():
    """The embedded example was made of these; other words would make its base model and pairs stale."""
    assert next(problem_stream("test", seed=0)) == Problem(
        prompt="Grace has 13 pens. Grace gets 2 more. Grace now has 4 times as many. Grace loses 33. "
        "How many pens does Grace have now?\n",
        solution="13+2=15\n15*4=60\n60-33=27\n#### 27",
        answer="27",
    )


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_end_with_a_line_break_so_that_prompt_and_answer_never_merge(split):
    for problem in problems(split, seed=1, count=20):
        assert re.search(r"\S\n$", problem.prompt)
        assert re.match(r"\d", problem.solution)
