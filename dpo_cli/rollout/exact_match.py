"""Task accuracy: does the model's greedy answer equal the right one, and by how much did training change that?

Reward margins and accuracies say what a model thinks of given answers; only its own answers say what it can do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.errors import DataError
from dpo_cli.rollout.generate import BATCH_TOKENS, Sampling, generate

# GSM8K's convention: the final answer follows four hashes; thousands may carry commas.
_ANSWER = re.compile(r"\s*\$?\s*(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"
# Two-sided 95% quantile of the normal distribution.
_Z = 1.959964


@dataclass(frozen=True)
class Problem:
    """A prompt as it is shown to the model, and the right answer as a number."""

    prompt: str
    answer: Decimal


@dataclass(frozen=True)
class Difference:
    """Accuracy before and after on the same problems, and the 95% interval of the gain. All are fractions."""

    before_mean: float
    after_mean: float
    gain: float
    low: float
    high: float


def extract_answer(text: str) -> Decimal | None:
    """The number that follows the last '####' in `text`, or None. "#### $1,200.50" is 1200.5."""
    _, mark, after = text.rpartition(_MARK)
    found = _ANSWER.match(after) if mark else None
    return Decimal(found[1] + found[2].replace(",", "")) if found else None


def load_problems(path: str | Path, *, limit: int | None = None) -> list[Problem]:
    """Read a JSONL file of {"prompt", "answer"}; the answer is a number, or text whose number follows '####'.

    limit: take only the first so many. Raises DataError that names file, row and field.
    """
    problems: list[Problem] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(problems) == limit:
                    break
                if line.strip():
                    problems.append(_parse_problem(line, where=f"{path} row {number}"))
    except OSError as error:
        raise DataError(f"The problems file cannot be read: {error.strerror}.", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "The problems file is not valid UTF-8.",
            where=f"{path}, after row {len(problems)}",
            hint="save the file as UTF-8",
        ) from error
    if not problems:
        raise DataError("The problems file holds no problems.", where=str(path))
    return problems


def _parse_problem(line: str, *, where: str) -> Problem:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"Not valid JSON: {error.msg}.", where=f"{where}, column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError("A problem must be a JSON object with prompt and answer.", where=where)
    for field in ("prompt", "answer"):
        if field not in row:
            hint = f"the row has {', '.join(sorted(row)) or 'no fields'}"
            raise DataError(f"The field {field!r} is missing.", where=where, hint=hint)
    prompt, answer = row["prompt"], row["answer"]
    if not isinstance(prompt, str) or not prompt:
        raise DataError("The field 'prompt' must be text that is not empty.", where=where)
    right = _right_answer(answer)
    if right is None:
        raise DataError(
            f"The field 'answer' holds no number: {answer!r}.",
            where=where,
            hint="give a number, or a worked solution that ends in '#### <number>'",
        )
    return Problem(prompt=prompt, answer=right)


def _right_answer(answer: object) -> Decimal | None:
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    text = str(answer)
    if _MARK not in text:
        # A bare number must be one to its end: "12 or 13" is not an answer.
        text = text.strip()
        found = _ANSWER.fullmatch(text)
        return Decimal(found[1] + found[2].replace(",", "")) if found else None
    return extract_answer(text)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    stop_token_ids: frozenset[int],
    encode: Callable[[str], Sequence[int]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> NDArray[np.bool_]:
    """(problems,) True where the greedy response's number after the last '####' equals the answer.

    encode: from a prompt to token ids, the way training saw prompts; the tokenizer's plain call by default.
    """
    encode = encode or (lambda prompt: tokenizer(prompt).input_ids)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stop_token_ids)
    responses = generate(
        model,
        [np.asarray(encode(problem.prompt), dtype=np.int32) for problem in problems],
        Sampling(max_new_tokens, temperature=0),
        stop_token_ids=stop_token_ids,
        pad_id=padding,
        batch_tokens=batch_tokens,
    )
    texts = tokenizer.batch_decode([response.tolist() for (response,) in responses], skip_special_tokens=True)
    return np.array([extract_answer(text) == problem.answer for text, problem in zip(texts, problems, strict=True)])


def paired_difference(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Difference:
    """The gain in accuracy on the same problems, with a 95% interval for the difference of paired proportions.

    The interval is the normal approximation after adding half a problem to each of the four cells (right or wrong,
    before and after), which keeps its coverage for few problems and for few changes. It speaks of other problems of
    the same kind, not of another training run.
    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24, 2005.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"need two equally long vectors of outcomes, not {before.shape} and {after.shape}")
    count = len(before) + 2.0
    gained = (int((after & ~before).sum()) + 0.5) / count
    lost = (int((before & ~after).sum()) + 0.5) / count
    margin = _Z * math.sqrt(max(gained + lost - (gained - lost) ** 2, 0.0) / count)
    before_mean, after_mean = float(before.mean()), float(after.mean())
    return Difference(
        before_mean=before_mean,
        after_mean=after_mean,
        gain=after_mean - before_mean,
        low=max(-1.0, gained - lost - margin),
        high=min(1.0, gained - lost + margin),
    )
