"""One canonical row: whatever the file looked like, a prompt and its responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Text = str
Messages = list[Message]
Prompt = Text | Messages
# A response is text to go on with, or the one assistant message that answers.
Response = Text | Message


class BadRow(Exception):
    """A row that cannot be used. reason: a key of reasons.REASONS; field: the column at fault, where there is one."""

    def __init__(self, reason: str, problem: str, field: str | None = None) -> None:
        super().__init__(reason, problem, field)
        self.reason = reason
        self.problem = problem
        self.field = field

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True)
class ReferenceLogps:
    """Log-probs of one response that came with the row. total: sum in nats; average: per token; per_token: each."""

    total: float
    average: float | None = None
    per_token: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """A prompt with its responses.

    responses: best first.
    levels: one number a response, rising as they get worse; equal numbers are ties.
    label: the verdict on a single response, None where responses are ranked or to be imitated.
    system: a system message that came beside a text prompt. tools: for the chat template.
    transcript: the texts are Anthropic's "Human: ... Assistant:" form.
    reference: beside `responses`, or None.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    levels: tuple[int, ...]
    label: bool | None = None
    system: str | None = None
    tools: list[Any] | None = None
    transcript: bool = False
    reference: tuple[ReferenceLogps, ...] | None = None


@dataclass(frozen=True)
class RawRow:
    """A row as a file gave it. number: from 1, the line in JSONL; content: JSON bytes, columns, or what failed."""

    number: int
    content: bytes | Mapping[str, Any] | BadRow
