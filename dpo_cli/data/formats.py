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

from dpo_cli.data import fields
from dpo_cli.data.conversations import (
    as_answer,
    is_transcript,
    split_conversations,
    split_transcripts,
    strip_prompt,
    the_answer,
)
from dpo_cli.data.fields import RawColumns, has
from dpo_cli.data.reference_columns import REFERENCE_COLUMNS, reference_logps
from dpo_cli.data.rows import BadRow, Messages, Prompt, Response, Row
from dpo_cli.data.templates import fill_template, template_fields
from dpo_cli.errors import DataError

Content = Literal["preferences", "ranked", "unpaired", "demonstrations"]
# lvwerra/stack-exchange-paired as the StackLLaMA recipe prompts it.
QUESTION_TEMPLATE = "Question: {question}\n\nAnswer: "
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


def _prompt_text(row: RawColumns, template: str | None, *, field: str = "prompt") -> str:
    return fields.filled_text(row, field) if template is None else fill_template(template, row)


def _with_system(prompt: Messages, row: RawColumns) -> Messages:
    system = _system(row)
    return prompt if system is None else [{"role": "system", "content": system}, *prompt]


def _prompt_messages(row: RawColumns, template: str | None) -> Messages:
    if template is None and isinstance(row.get("prompt"), list):
        return fields.messages(row, "prompt")
    return [{"role": "user", "content": _prompt_text(row, template)}]


def _system(row: RawColumns) -> str | None:
    """The system column beside a text prompt, which only a chat template can place."""
    return fields.as_text(row["system"], "system") if row.get("system") else None


def _pair(row: RawColumns, prompt: Prompt, chosen: Response, rejected: Response, *, transcript: bool = False) -> Row:
    return Row(
        prompt=prompt,
        responses=(chosen, rejected),
        levels=(0, 1),
        system=_system(row) if isinstance(prompt, str) else None,
        tools=fields.tools(row),
        transcript=transcript,
        reference=reference_logps(row),
    )


def _read_text_pair(row: RawColumns, template: str | None, *, prompt: str, chosen: str, rejected: str) -> Row:
    asked = _prompt_text(row, template, field=prompt)
    return _pair(row, asked, fields.filled_text(row, chosen), fields.filled_text(row, rejected))


def _read_question_pair(row: RawColumns, template: str | None) -> Row:
    return _read_text_pair(
        row, template or QUESTION_TEMPLATE, prompt="question", chosen="response_j", rejected="response_k"
    )


def _as_messages(row: RawColumns, field: str) -> Messages:
    """A response column as messages: a list of them, one of them, or bare text."""
    value = fields.need(row, field)
    if isinstance(value, str):
        return [{"role": "assistant", "content": fields.filled_text(row, field)}]
    return [fields.as_message(value, field)] if isinstance(value, dict) else fields.messages(row, field)


def _read_message_pair(row: RawColumns, template: str | None) -> Row:
    chosen, rejected = _as_messages(row, "chosen"), _as_messages(row, "rejected")
    if isinstance(row.get("prompt"), str) and len(chosen) > 1 and template is None:
        # UltraFeedback: the prompt once as text, and again as the first message of both conversations.
        prompt, better, worse = split_conversations(chosen, rejected)
    else:
        prompt = _prompt_messages(row, template)
        better, worse = strip_prompt(prompt, chosen, "chosen"), strip_prompt(prompt, rejected, "rejected")
    return _pair(row, _with_system(prompt, row), better, worse)


def _read_implicit_messages(row: RawColumns, template: str | None) -> Row:
    prompt, better, worse = split_conversations(fields.messages(row, "chosen"), fields.messages(row, "rejected"))
    return _pair(row, _with_system(prompt, row), better, worse)


def _read_transcripts(row: RawColumns, template: str | None) -> Row:
    prompt, better, worse = split_transcripts(fields.text(row, "chosen"), fields.text(row, "rejected"))
    fields.check_filled(better, "chosen")
    fields.check_filled(worse, "rejected")
    return _pair(row, prompt, better, worse, transcript=True)


def _read_sharegpt(row: RawColumns, template: str | None) -> Row:
    prompt = _with_system(fields.messages(row, "conversations"), row)
    better, worse = (the_answer(_as_messages(row, name), name) for name in ("chosen", "rejected"))
    return _pair(row, prompt, better, worse)


def _read_ranked(row: RawColumns, template: str | None) -> Row:
    listed = fields.items(row, "responses")
    if len(listed) < 2:
        raise BadRow(
            "too_few_responses", f"'responses' holds {len(listed)}; a preference needs at least 2", "responses"
        )
    if has(row, "scores"):
        scores = [fields.as_number(value, f"scores[{at}]") for at, value in enumerate(fields.items(row, "scores"))]
        if len(scores) != len(listed):
            raise BadRow("wrong_type", f"'scores' holds {len(scores)} for {len(listed)} responses", "scores")
        order = sorted(range(len(listed)), key=lambda at: -scores[at])
        distinct = sorted(set(scores), reverse=True)
        levels = tuple(distinct.index(scores[at]) for at in order)
    else:
        order, levels = list(range(len(listed))), tuple(range(len(listed)))
    as_text = isinstance(listed[0], str)
    prompt: Prompt
    if as_text and not (template is None and isinstance(row.get("prompt"), list)):
        prompt = _prompt_text(row, template)
    else:
        prompt = _with_system(_prompt_messages(row, template), row)
    responses = tuple(_ranked_response(listed[at], prompt, f"responses[{at}]") for at in order)
    system = _system(row) if isinstance(prompt, str) else None
    return Row(prompt=prompt, responses=responses, levels=levels, system=system, tools=fields.tools(row))


def _ranked_response(value: object, prompt: Prompt, field: str) -> Response:
    if isinstance(prompt, str) or isinstance(value, str):
        said = fields.check_filled(fields.as_text(value, field), field)
        return said if isinstance(prompt, str) else {"role": "assistant", "content": said}
    listed = value if isinstance(value, list) else [value]
    return strip_prompt(prompt, [fields.as_message(item, field) for item in listed], field)


def _read_single(row: RawColumns, template: str | None, *, labelled: bool) -> Row:
    prompt: Prompt
    response: Response
    if isinstance(row.get("completion"), str) and not (template is None and isinstance(row.get("prompt"), list)):
        prompt = _prompt_text(row, template)
        response = fields.filled_text(row, "completion")
    else:
        prompt = _prompt_messages(row, template)
        response = strip_prompt(prompt, _as_messages(row, "completion"), "completion")
        prompt = _with_system(prompt, row)
    label = fields.verdict(row, "label") if labelled else None
    system = _system(row) if isinstance(prompt, str) else None
    return Row(prompt=prompt, responses=(response,), levels=(0,), label=label, system=system, tools=fields.tools(row))


def _read_conversation(row: RawColumns, template: str | None, *, field: str) -> Row:
    conversation = fields.messages(row, field)
    if len(conversation) < 2:
        raise BadRow("no_prompt", f"'{field}' holds a single message, so there is no prompt", field)
    answer = as_answer(conversation[-1], f"{field}[{len(conversation) - 1}]")
    prompt = _with_system(conversation[:-1], row)
    return Row(prompt=prompt, responses=(answer,), levels=(0,), tools=fields.tools(row))


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
        _read_sharegpt,
    ),
    Format(
        "prompt/responses, ranked",
        "ranked",
        ("prompt", "responses", "scores", *_EXTRA),
        lambda row: _all_present(row, "prompt") and isinstance(row.get("responses"), list),
        _read_ranked,
    ),
    Format(
        "question/response_j/response_k",
        "preferences",
        ("question", "response_j", "response_k", *_EXTRA, *REFERENCE_COLUMNS),
        lambda row: _all_text(row, "response_j", "response_k"),
        _read_question_pair,
    ),
    Format(
        "prompt/chosen/rejected text",
        "preferences",
        _PAIR,
        lambda row: _all_text(row, "prompt", "chosen", "rejected"),
        partial(_read_text_pair, prompt="prompt", chosen="chosen", rejected="rejected"),
    ),
    Format(
        "prompt/chosen/rejected messages",
        "preferences",
        _PAIR,
        lambda row: _all_present(row, "prompt", "chosen", "rejected") and _any_messages(row),
        _read_message_pair,
    ),
    Format(
        "question/chosen/rejected text",
        "preferences",
        ("question", "chosen", "rejected", *_EXTRA, *REFERENCE_COLUMNS),
        lambda row: _all_text(row, "question", "chosen", "rejected"),
        partial(_read_text_pair, prompt="question", chosen="chosen", rejected="rejected"),
    ),
    Format(
        "chosen/rejected conversations, prompt implicit",
        "preferences",
        _PAIR,
        lambda row: isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list),
        _read_implicit_messages,
    ),
    Format(
        "chosen/rejected HH transcripts, prompt implicit",
        "preferences",
        _PAIR,
        lambda row: is_transcript(row.get("chosen")) and is_transcript(row.get("rejected")),
        _read_transcripts,
    ),
    Format(
        "prompt/completion/label",
        "unpaired",
        ("prompt", "completion", "label", *_EXTRA),
        lambda row: _all_present(row, "prompt", "completion", "label"),
        partial(_read_single, labelled=True),
    ),
    Format(
        "prompt/completion",
        "demonstrations",
        ("prompt", "completion", *_EXTRA),
        lambda row: _all_present(row, "prompt", "completion"),
        partial(_read_single, labelled=False),
    ),
    Format(
        "messages",
        "demonstrations",
        ("messages", *_EXTRA),
        lambda row: isinstance(row.get("messages"), list),
        partial(_read_conversation, field="messages"),
    ),
    Format(
        "ShareGPT conversations",
        "demonstrations",
        ("conversations", *_EXTRA),
        lambda row: isinstance(row.get("conversations"), list),
        partial(_read_conversation, field="conversations"),
    ),
)
FORMAT_BY_NAME = {known.name: known for known in FORMATS}


def columns_to_read(known: Format, columns: Sequence[tuple[str, str]], prompt_template: str | None) -> frozenset[str]:
    """The file's own columns that this format, the mapping and the prompt template look at."""
    wanted = set(known.columns) | {own for _, own in columns}
    if prompt_template is not None or known.name.startswith("question/response_j"):
        wanted |= set(template_fields(prompt_template or QUESTION_TEMPLATE))
    return frozenset(wanted)
