"""What an evaluation found, as JSON and as a table; and the comparison of two policies on the same questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dpo_cli.atomic import json_bytes, replacing
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.rollout.answers import Answered
from dpo_cli.rollout.statistics import (
    Comparison,
    Estimate,
    bootstrap_mean,
    compare,
    maj_at_k,
    pass_at_k,
    wilson,
)


@dataclass(frozen=True)
class TaskResult:
    """How one policy did on its questions.

    outcomes: by question, whether each response is right; () where the prompt left no room for any.
    asked: hexadecimal digits over the questions and their truths: equal where two results may be compared.
    """

    model: str
    verifier: str
    sampling: dict[str, Any]
    asked: str
    outcomes: tuple[tuple[bool, ...], ...]
    accuracy: Estimate
    pass_at: dict[int, Estimate]
    maj_at: dict[int, Estimate]
    stopped: float
    tokens: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "mode": "task",
            "model": self.model,
            "verifier": self.verifier,
            "sampling": self.sampling,
            "questions": len(self.outcomes),
            "asked": self.asked,
            "accuracy": self.accuracy.as_dict(),
            "pass_at": {str(k): estimate.as_dict() for k, estimate in self.pass_at.items()},
            "maj_at": {str(k): estimate.as_dict() for k, estimate in self.maj_at.items()},
            "stopped": self.stopped,
            "mean_tokens": self.tokens,
            "outcomes": [[int(right) for right in each] for each in self.outcomes],
        }


def task_result(
    answered: Sequence[Answered],
    *,
    model: str,
    verifier: str,
    sampling: dict[str, Any],
    pass_at: Sequence[int],
    maj_at: Sequence[int],
    seed: int,
) -> TaskResult:
    """A prompt that left no room for a response counts as not solved: leaving it out would flatter the policy."""
    samples = int(sampling["samples_per_prompt"])
    right = [each.right or [False] * samples for each in answered]
    answers = [[one.answer for one in each.responses] or [None] * samples for each in answered]
    responses = [response for each in answered for response in each.responses]
    if samples == 1:
        accuracy = wilson(sum(each[0] for each in right), len(right))
    else:
        # Several responses to one question are no independent trials.
        accuracy = bootstrap_mean([sum(each) / samples for each in right], seed=seed)
    return TaskResult(
        model=model,
        verifier=verifier,
        sampling=sampling,
        asked=_asked(answered),
        outcomes=tuple(tuple(each) for each in right),
        accuracy=accuracy,
        pass_at={k: bootstrap_mean([pass_at_k(samples, sum(each), k) for each in right], seed=seed) for k in pass_at},
        maj_at={
            k: bootstrap_mean([maj_at_k(*each, k) for each in zip(answers, right, strict=True)], seed=seed)
            for k in maj_at
        },
        stopped=sum(response.stopped for response in responses) / len(responses),
        tokens=sum(len(response.ids) for response in responses) / len(responses),
    )


def _asked(answered: Sequence[Answered]) -> str:
    questions = [[each.question.prompt, each.question.truth] for each in answered]
    return hashlib.blake2b(json_bytes(questions), digest_size=16).hexdigest()


@dataclass(frozen=True)
class SavedResult:
    """What a comparison needs of an earlier result."""

    name: str
    model: str
    asked: str
    verifier: str
    first: tuple[bool, ...]

    @classmethod
    def of(cls, result: TaskResult, name: str) -> SavedResult:
        return cls(name, result.model, result.asked, result.verifier, tuple(each[0] for each in result.outcomes))


def read_result(path: Path) -> SavedResult:
    """A result of mode=task. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_bytes())
        first = tuple(bool(each[0]) for each in content["outcomes"])
        return SavedResult(str(path), content["model"], content["asked"], content["verifier"], first)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"This is no result of dpo-eval mode=task: {type(error).__name__} {error}.", where=str(path)
        ) from None


def compared(first: SavedResult, second: SavedResult) -> Comparison:
    """Question by question, by the first response to each. Raises DataError where the questions are others."""
    if first.asked != second.asked:
        raise DataError(
            "These results are of different questions, so they cannot be compared question by question.",
            where=f"{first.name} ({len(first.first):,} questions) and {second.name} ({len(second.first):,})",
            hint="ask both policies with the same prompts, limit and prompt_template",
        )
    if first.verifier != second.verifier:
        raise DataError(
            "These results were judged differently.",
            where=f"{first.name} by {first.verifier}, {second.name} by {second.verifier}",
            hint=f"verifier={first.verifier}",
        )
    return compare(np.array(first.first), np.array(second.first))


def comparison_as_dict(first: SavedResult, second: SavedResult, found: Comparison) -> dict[str, Any]:
    interval = found.interval
    return {
        "first": first.model,
        "second": second.model,
        "questions": found.questions,
        "accuracy_first": interval.before_mean,
        "accuracy_second": interval.after_mean,
        "gain": interval.gain,
        "low": interval.low,
        "high": interval.high,
        "only_second_right": found.gained,
        "only_first_right": found.lost,
        "mcnemar_p": found.p,
    }


def task_table(result: TaskResult) -> Table:
    table = Table(title=f"{result.model}: {len(result.outcomes):,} questions, {result.verifier}")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    _add(table, "accuracy", result.accuracy)
    for k, estimate in result.pass_at.items():
        _add(table, f"pass@{k}", estimate)
    for k, estimate in result.maj_at.items():
        _add(table, f"maj@{k}", estimate)
    table.add_row("stopped by themselves", f"{result.stopped:.1%}", "")
    table.add_row("tokens a response", f"{result.tokens:.1f}", "")
    return table


def comparison_table(first: SavedResult, second: SavedResult, found: Comparison) -> Table:
    interval = found.interval
    table = Table(title=f"the same {found.questions:,} questions")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    table.add_row(first.model, f"{interval.before_mean:.1%}", "")
    table.add_row(second.model, f"{interval.after_mean:.1%}", "")
    table.add_row(
        "gain, points",
        f"{100 * interval.gain:+.1f}",
        f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}",
    )
    table.add_row("only the second is right", f"{found.gained:,}", "")
    table.add_row("only the first is right", f"{found.lost:,}", "")
    table.add_row("McNemar's exact p", f"{found.p:.3g}", "")
    return table


def estimates_table(title: str, estimates: dict[str, Estimate], *, shares: Sequence[str]) -> Table:
    """shares: names of estimates that are shown in percent."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    for name, estimate in estimates.items():
        if name in shares:
            _add(table, name, estimate)
        else:
            table.add_row(name, f"{estimate.value:+.4f}", f"{estimate.low:+.4f} to {estimate.high:+.4f}")
    return table


def _add(table: Table, name: str, estimate: Estimate) -> None:
    table.add_row(name, f"{estimate.value:.1%}", f"{estimate.low:.1%} to {estimate.high:.1%}")


def write_result(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all, never over a file that is there."""
    if path.exists():
        raise ConfigError(
            f"{path} has come to be there meanwhile.", where="out", hint="move it, and give the command again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
