"""Accuracy before and after is of the same problems, also where a resumed run asks others than it began with."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import dpo_cli.train.task_accuracy as task_accuracy
from dpo_cli.engine.interface import OptimizerSettings
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.rollout.exact_match import Problem
from dpo_cli.train.console import RunConsole
from dpo_cli.train.task_accuracy import TaskAccuracy

PROBLEMS = [Problem(prompt=f"What is {number} + 0?", answer=Decimal(number)) for number in range(8)]
_MODEL = nn.Linear(1, 1)
ENGINE = ReplicatedEngine(_MODEL, _MODEL, OptimizerSettings("adamw", weight_decay=0.0, max_grad_norm=None))
POLICY: Any = SimpleNamespace(model=None, tokenizer=None, stop_token_ids=frozenset({0}))


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for the model: solves nothing the first time it is asked, everything from then on; notes how much."""
    asked: list[int] = []

    def exact_match(model: Any, tokenizer: Any, problems: list[Problem], **settings: Any) -> np.ndarray:
        asked.append(len(problems))
        return np.full(len(problems), len(asked) > 1)

    monkeypatch.setattr(task_accuracy, "exact_match", exact_match)
    return asked


def accuracy(folder: Path, problems: list[Problem], max_new_tokens: int = 16) -> TaskAccuracy:
    return TaskAccuracy(problems, max_new_tokens, encode=lambda prompt: [1], file=folder / "exact_match.json")


def test_a_resumed_run_keeps_what_it_found_before_training(tmp_path: Path, solved: list[int]) -> None:
    for _ in range(2):
        accuracy(tmp_path, PROBLEMS).before(POLICY, ENGINE, RunConsole())
    assert accuracy(tmp_path, PROBLEMS).after(POLICY, ENGINE, RunConsole()).gain == 1
    assert solved == [8, 8]


@pytest.mark.parametrize(("problems", "max_new_tokens"), [(PROBLEMS[:5], 16), (PROBLEMS[::-1], 16), (PROBLEMS, 32)])
def test_a_resumed_run_that_asks_otherwise_asks_the_starting_policy_again(
    tmp_path: Path, solved: list[int], problems: list[Problem], max_new_tokens: int
) -> None:
    accuracy(tmp_path, PROBLEMS).before(POLICY, ENGINE, RunConsole())
    resumed = accuracy(tmp_path, problems, max_new_tokens)
    resumed.before(POLICY, ENGINE, RunConsole())
    assert resumed.after(POLICY, ENGINE, RunConsole()).before_mean == 1
    assert solved == [8, len(problems), len(problems)]
