"""Arithmetic word problems with worked solutions: the text behind the embedded example.

A person owns some things, a few events change how many, and the question asks for the end. Half of the problems also
tell something that does not matter. Every problem is a pure function of (split, seed, its number), and the splits are
disjoint by text whatever their sizes and seeds: a hash of the prompt says which split it may appear in.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["demonstrations", "preferences", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps")
# Numbers in the text and after every event stay within two digits.
LARGEST_NUMBER = 99
LARGEST_FACTOR = 9
EVENTS_PER_PROBLEM = (2, 3)
DISTRACTOR_PROBABILITY = 0.5

_GAINS = ("buys {n} more", "finds {n} more", "gets {n} more")
_LOSSES = ("gives away {n}", "loses {n}", "sells {n}")
_MULTIPLES = ("now has {n} times as many",)
_DISTRACTORS = ("{other} has {n} {thing}.", "{other} buys {n} {thing}.", "{person} also has {n} {unrelated}.")


@dataclass(frozen=True)
class Problem:
    """A prompt, its worked solution ("12+7=19", one line an event, then "#### 19") and the answer as text."""

    prompt: str
    solution: str
    answer: str


def split_of(prompt: str) -> Split:
    """The one split in which this text may appear."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return SPLITS[digest[0] % len(SPLITS)]


def problems(split: Split, *, seed: int, count: int) -> list[Problem]:
    """The first `count` problems of a split, all different."""
    stream = problem_stream(split, seed=seed)
    return [next(stream) for _ in range(count)]


def problem_stream(split: Split, *, seed: int) -> Iterator[Problem]:
    """Problems of a split without end and without repetition."""
    # A string seeds Python's generator by its SHA-512: the same on every machine and every version of Python 3.
    draw = random.Random(f"arithmetic:{seed}:{split}")
    seen: set[str] = set()
    while True:
        problem = _draw_problem(draw)
        if problem.prompt not in seen and split_of(problem.prompt) == split:
            seen.add(problem.prompt)
            yield problem


def _draw_problem(draw: random.Random) -> Problem:
    person, other = draw.sample(NAMES, 2)
    thing, unrelated = draw.sample(THINGS, 2)
    total = draw.randint(2, LARGEST_NUMBER)
    sentences = [f"{person} has {total} {thing}."]
    lines = []
    for _ in range(draw.choice(EVENTS_PER_PROBLEM)):
        sentence, symbol, number, result = _draw_event(draw, total)
        sentences.append(f"{person} {sentence}.")
        lines.append(f"{total}{symbol}{number}={result}")
        total = result
    if draw.random() < DISTRACTOR_PROBABILITY:
        distractor = draw.choice(_DISTRACTORS).format(
            person=person, other=other, n=draw.randint(2, LARGEST_NUMBER), thing=thing, unrelated=unrelated
        )
        sentences.insert(draw.randint(0, len(sentences)), distractor)
    sentences.append(f"How many {thing} does {person} have now?")
    return Problem(prompt=" ".join(sentences) + "\n", solution="\n".join([*lines, f"#### {total}"]), answer=str(total))


def _draw_event(draw: random.Random, total: int) -> tuple[str, str, int, int]:
    """An event that keeps the total within 1..LARGEST_NUMBER: its words, its operator, its number and the new total."""
    kinds = []
    if total < LARGEST_NUMBER:
        kinds.append("+")
    if total > 1:
        kinds.append("-")
    if 2 * total <= LARGEST_NUMBER:
        kinds.append("*")
    symbol = draw.choice(kinds)
    if symbol == "+":
        number = draw.randint(1, LARGEST_NUMBER - total)
        return draw.choice(_GAINS).format(n=number), symbol, number, total + number
    if symbol == "-":
        number = draw.randint(1, total - 1)
        return draw.choice(_LOSSES).format(n=number), symbol, number, total - number
    number = draw.randint(2, min(LARGEST_FACTOR, LARGEST_NUMBER // total))
    return draw.choice(_MULTIPLES).format(n=number), symbol, number, total * number
