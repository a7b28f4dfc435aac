"""The shapes that preference data comes in: recognise one, and map each of its rows to the canonical row.

A format is found from the first rows of a file and then holds for all of it, so that a row which differs is named
instead of guessed at.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dpo_cli.data.conversations import is_transcript
from dpo_cli.data.fields import RawColumns, has
from dpo_cli.data.map_rows import (
    QUESTION_TEMPLATE,
    read_answer,
    read_conversation,
    read_implicit_messages,
    read_message_pair,
    read_question_pair,
    read_ranked,
    read_sharegpt,
    read_single,
    read_text_pair,
    read_transcripts,
)
from dpo_cli.data.reference_columns import REFERENCE_COLUMNS
from dpo_cli.data.rows import BadRow, Row
from dpo_cli.data.templates import template_fields
from dpo_cli.errors import DataError

Content = Literal["preferences", "ranked", "unpaired", "demonstrations"]
CANONICAL_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "scores",
    "completion",
    "label",
    "conversations",
    "messages",
    "question",
    "answer",
    "response_j",
    "response_k",
    "system",
    "tools",
    *REFERENCE_COLUMNS,
)


@dataclass(frozen=True)
class Format:
    """name: as the screen shows it. content: what its rows hold. read: one row's columns to a canonical row.

    columns: those it may look at; others need not be read from disk.
    """

    name: str
    content: Content
    columns: tuple[str, ...]
    matches: Callable[[RawColumns], bool]
    read: Callable[[RawColumns, str | None], Row]


def detect_format(
    rows: Sequence[RawColumns], *, mapped: frozenset[str], prompt_template: str | None, where: str
) -> Format:
    """The first format that any of a file's first rows has.

    mapped: canonical names that `data.columns` gives; a format must use all of them.
    Raises DataError naming the columns found when there is none.
    """
    templated = prompt_template is not None
    for row in rows:
        seen = {**row, "prompt": row.get("prompt") or "templated"} if templated else row
        for known in FORMATS:
            if mapped <= set(known.columns) and known.matches(seen):
                return known
    found = list(dict.fromkeys(str(name) for row in rows for name in row))
    raise DataError(
        f"No known format has the columns {', '.join(found) or '(none)'}.",
        where=where,
        hint="name them: data.columns.prompt=... data.columns.chosen=... data.columns.rejected=...; known are "
        + "; ".join(dict.fromkeys(known.name for known in FORMATS)),
    )


def rename_columns(row: RawColumns, columns: Sequence[tuple[str, str]]) -> RawColumns:
    """The row under canonical names. columns: (canonical, the file's own) pairs."""
    if not columns:
        return row
    renamed = dict(row)  # under their own names too, for the prompt template
    for canonical, own in columns:
        if own not in row:
            raise BadRow("missing_field", f"'{own}' is missing; the row has {', '.join(map(str, row))}", own)
        renamed[canonical] = row[own]
    return renamed


def check_column_names(columns: Sequence[tuple[str, str]]) -> None:
    for canonical, _ in columns:
        if canonical not in CANONICAL_COLUMNS:
            close = difflib.get_close_matches(canonical, CANONICAL_COLUMNS, n=1)
            raise DataError(
                f"data.columns maps '{canonical}', which is no name known here.",
                where="data.columns",
                hint=f"did you mean {close[0]}?" if close else f"one of {', '.join(CANONICAL_COLUMNS)}",
            )


def _all_text(row: RawColumns, *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


def _any_messages(row: RawColumns) -> bool:
    return any(isinstance(row.get(name), (list, dict)) for name in ("prompt", "chosen", "rejected"))


def _all_present(row: RawColumns, *names: str) -> bool:
    return all(has(row, name) for name in names)


_EXTRA = ("system", "tools")
_PAIR = ("prompt", "chosen", "rejected", *_EXTRA, *REFERENCE_COLUMNS)

FORMATS: tuple[Format, ...] = (
    Format(
        "ShareGPT conversations + chosen/rejected",
        "preferences",
        ("conversations", "chosen", "rejected", *_EXTRA, *REFERENCE_COLUMNS),
        lambda row: isinstance(row.get("conversations"), list) and _all_present(row, "chosen", "rejected"),
        read_sharegpt,
    ),
    Format(
        "prompt/responses, ranked",
        "ranked",
        ("prompt", "responses", "scores", *_EXTRA),
        lambda row: _all_present(row, "prompt") and isinstance(row.get("responses"), list),
        read_ranked,
    ),
    Format(
        "question/response_j/response_k",
        "preferences",
        ("question", "response_j", "response_k", *_EXTRA, *REFERENCE_COLUMNS),
        lambda row: _all_text(row, "response_j", "response_k"),
        read_question_pair,
    ),
    Format(
        "prompt/chosen/rejected text",
        "preferences",
        _PAIR,
        lambda row: _all_text(row, "prompt", "chosen", "rejected"),
        partial(read_text_pair, prompt="prompt", chosen="chosen", rejected="rejected"),
    ),
    Format(
        "prompt/chosen/rejected messages",
        "preferences",
        _PAIR,
        lambda row: _all_present(row, "prompt", "chosen", "rejected") and _any_messages(row),
        read_message_pair,
    ),
    Format(
        "question/chosen/rejected text",
        "preferences",
        ("question", "chosen", "rejected", *_EXTRA, *REFERENCE_COLUMNS),
        lambda row: _all_text(row, "question", "chosen", "rejected"),
        partial(read_text_pair, prompt="question", chosen="chosen", rejected="rejected"),
    ),
    Format(
        "chosen/rejected conversations, prompt implicit",
        "preferences",
        _PAIR,
        lambda row: isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list),
        read_implicit_messages,
    ),
    Format(
        "chosen/rejected HH transcripts, prompt implicit",
        "preferences",
        _PAIR,
        lambda row: is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")),
        read_transcripts,
    ),
    Format(
        "prompt/completion/label",
        "unpaired",
        ("prompt", "completion", "label", *_EXTRA),
        lambda row: _all_present(row, "prompt", "completion", "label"),
        partial(read_single, labelled=True),
    ),
    Format(
        "prompt/completion",
        "demonstrations",
        ("prompt", "completion", *_EXTRA),
        lambda row: _all_present(row, "prompt", "completion"),
        partial(read_single, labelled=False),
    ),
    Format(
        "question/answer",
        "demonstrations",
        ("question", "answer", *_EXTRA),
        lambda row: _all_text(row, "question", "answer"),
        read_answer,
    ),
    Format(
        "messages",
        "demonstrations",
        ("messages", *_EXTRA),
        lambda row: isinstance(row.get("messages"), list),
        partial(read_conversation, field="messages"),
    ),
    Format(
        "ShareGPT conversations",
        "demonstrations",
        ("conversations", *_EXTRA),
        lambda row: isinstance(row.get("conversations"), list),
        partial(read_conversation, field="conversations"),
    ),
)
FORMAT_BY_NAME = {known.name: known for known in FORMATS}


def columns_to_read(known: Format, columns: Sequence[tuple[str, str]], prompt_template: str | None) -> frozenset[str]:
    """The file's own columns that this format, the mapping and the prompt template look at."""
    wanted = set(known.columns) | {own for _, own in columns}
    if prompt_template is not None or known.name.startswith("question/response_j"):
        wanted |= set(template_fields(prompt_template or QUESTION_TEMPLATE))
    return frozenset(wanted)
