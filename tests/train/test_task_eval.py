"""Accuracy before and after is of the same problems, also where a resumed run asks others than it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dpo_cli.train.task_eval as task_eval
from dpo_cli.engine.interface import OptimizerSettings
from dpo_cli.engine.ranks import SoleRank
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.errors import DataError
from dpo_cli.paths import resolve_path
from dpo_cli.policy.load import load_model
from dpo_cli.rollout.answers import Drawing
from dpo_cli.rollout.generate import Sampling
from dpo_cli.rollout.questions import Question
from dpo_cli.rollout.verify import verifier_of
from dpo_cli.train.console import RunConsole
from dpo_cli.train.task_eval import METRIC, TaskEvaluation

PROBLEMS = [Question(number, f"What is {number} + 0?", str(number), f"row {number}") for number in range(8)]
_MODEL = nn.Linear(1, 1)
ENGINE = ReplicatedEngine(_MODEL, _MODEL, OptimizerSettings("adamw", weight_decay=0.0, max_grad_norm=None))
POLICY: Any = SimpleNamespace(model=None)
ENCODER: Any = None


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for the model: solves nothing the first time it is asked, everything from then on; notes how much."""
    asked: list[int] = []

    def solve(
        model: Any, encoder: Any, questions: list[Question], *settings: Any, stopping: Callable[[], bool], heard: Any
    ) -> list[bool] | None:
        asked.append(len(questions))
        return None if stopping() else [len(asked) > 1] * len(questions)

    monkeypatch.setattr(task_eval, "solve", solve)
    return asked


def evaluation(folder: Path, problems: list[Question], max_new_tokens: int = 16, during: int = 3) -> TaskEvaluation:
    drawing = Drawing(Sampling(max_new_tokens, temperature=0), 1, 0)
    return TaskEvaluation(
        POLICY, ENCODER, problems, verifier_of("gsm8k"), drawing, during=during, file=folder / "task.json"
    )


def test_a_resumed_run_keeps_what_it_found_before_training(tmp_path: Path, solved: list[int]) -> None:
    for _ in range(2):
        evaluation(tmp_path, PROBLEMS).before(ENGINE, RunConsole())
    assert evaluation(tmp_path, PROBLEMS).after(ENGINE, RunConsole()).gain == 1
    assert solved == [8, 8]


@pytest.mark.parametrize(("problems", "max_new_tokens"), [(PROBLEMS[:5], 16), (PROBLEMS[::-1], 16), (PROBLEMS, 32)])
def test_a_resumed_run_that_asks_otherwise_asks_the_starting_policy_again(
    tmp_path: Path, solved: list[int], problems: list[Question], max_new_tokens: int
) -> None:
    evaluation(tmp_path, PROBLEMS).before(ENGINE, RunConsole())
    resumed = evaluation(tmp_path, problems, max_new_tokens)
    resumed.before(ENGINE, RunConsole())
    assert resumed.after(ENGINE, RunConsole()).before_mean == 1
    assert solved == [8, len(problems), len(problems)]


def test_during_training_the_first_problems_are_asked(tmp_path: Path, solved: list[int]) -> None:
    task = evaluation(tmp_path, PROBLEMS, during=3)
    assert task.evaluate(ENGINE, should_stop=lambda: False) == {METRIC: 0.0}
    assert task.evaluate(ENGINE, should_stop=lambda: False) == {METRIC: 1.0}
    assert evaluation(tmp_path, PROBLEMS, during=0).evaluate(ENGINE, should_stop=lambda: False) == {}
    assert solved == [3, 3]


def test_an_evaluation_that_was_stopped_is_none(tmp_path: Path, solved: list[int]) -> None:
    assert evaluation(tmp_path, PROBLEMS).evaluate(ENGINE, should_stop=lambda: True) is None


def settings(problems: Path, **others: Any) -> Any:
    given = {"verifier": "gsm8k", "prompt_template": None, "limit": None, "max_new_tokens": 48, "during": 2}
    return SimpleNamespace(problems=str(problems), **{**given, **others})


def test_the_embedded_model_solves_its_problems_in_parts_as_in_whole(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(
        path="dpo_cli://example/base", revision=None, dtype="float32", attention="auto", gradient_checkpointing=False,
        checkpoint_every=1, offload_checkpoints=False, pad_rows_to=1,
        trust_remote_code=False, adapter=None, reference=None, lora=None,
    )  # fmt: skip
    policy = load_model(model, device=torch.device("cpu"), seed=0)
    file = Path(resolve_path("dpo_cli://example/problems.jsonl"))
    task = TaskEvaluation.of(settings(file, limit=40, during=20), policy, tmp_path, SoleRank(), chat=False)
    task.before(ENGINE, RunConsole())
    before = json.loads((tmp_path / "task.json").read_text())["before"]
    assert 0.3 < sum(before) / 40 < 0.95
    assert task.evaluate(ENGINE, should_stop=lambda: False) == {METRIC: sum(before[:20]) / 20}
    assert task.after(ENGINE, RunConsole()).gain == 0
    shown = json.loads((tmp_path / "task.json").read_text())["shown"]
    assert len(shown) == 8 and all(row["before"] == row["after"] != "" for row in shown)
    assert [f"#### {row['truth']}" in row["after"] for row in shown] == [bool(right) for right in before[:8]]

    with pytest.raises(DataError, match=r"eval\.task\.max_new_tokens"):
        TaskEvaluation.of(settings(file, max_new_tokens=512), policy, tmp_path, SoleRank(), chat=False)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "a", "answer": "twelve"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl row 2"):
        TaskEvaluation.of(settings(tmp_path / "bad.jsonl"), policy, tmp_path, SoleRank(), chat=False)
