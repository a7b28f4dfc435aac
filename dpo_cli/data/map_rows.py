"""One row of each known format to the canonical row. `template` is data.prompt_template, or None."""

from __future__ import annotations

from dpo_cli.data import fields
from dpo_cli.data.conversations import as_answer, split_conversations, split_transcripts, strip_prompt, the_answer
from dpo_cli.data.fields import RawColumns, has
from dpo_cli.data.reference_columns import reference_logps
from dpo_cli.data.rows import BadRow, Messages, Prompt, Response, Row
from dpo_cli.data.templates import fill_template

# lvwerra/stack-exchange-paired as the StackLLaMA recipe prompts it.
QUESTION_TEMPLATE = "Question: {question}\n\nAnswer: "


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


def read_text_pair(row: RawColumns, template: str | None, *, prompt: str, chosen: str, rejected: str) -> Row:
    asked = _prompt_text(row, template, field=prompt)
    return _pair(row, asked, fields.filled_text(row, chosen), fields.filled_text(row, rejected))


def read_question_pair(row: RawColumns, template: str | None) -> Row:
    return read_text_pair(
        row, template or QUESTION_TEMPLATE, prompt="question", chosen="response_j", rejected="response_k"
    )


def _as_messages(row: RawColumns, field: str) -> Messages:
    """A response column as messages: a list of them, one of them, or bare text."""
    value = fields.need(row, field)
    if isinstance(value, str):
        return [{"role": "assistant", "content": fields.filled_text(row, field)}]
    return [fields.as_message(value, field)] if isinstance(value, dict) else fields.messages(row, field)


def read_message_pair(row: RawColumns, template: str | None) -> Row:
    chosen, rejected = _as_messages(row, "chosen"), _as_messages(row, "rejected")
    if isinstance(row.get("prompt"), str) and len(chosen) > 1 and template is None:
        # UltraFeedback: the prompt once as text, and again as the first message of both conversations.
        prompt, better, worse = split_conversations(chosen, rejected)
    else:
        prompt = _prompt_messages(row, template)
        better, worse = strip_prompt(prompt, chosen, "chosen"), strip_prompt(prompt, rejected, "rejected")
    return _pair(row, _with_system(prompt, row), better, worse)


def read_implicit_messages(row: RawColumns, template: str | None) -> Row:
    prompt, better, worse = split_conversations(fields.messages(row, "chosen"), fields.messages(row, "rejected"))
    return _pair(row, _with_system(prompt, row), better, worse)


def read_transcripts(row: RawColumns, template: str | None) -> Row:
    prompt, better, worse = split_transcripts(fields.text(row, "chosen"), fields.text(row, "rejected"))
    fields.check_filled(better, "chosen")
    fields.check_filled(worse, "rejected")
    return _pair(row, prompt, better, worse, transcript=True)


def read_sharegpt(row: RawColumns, template: str | None) -> Row:
    prompt = _with_system(fields.messages(row, "conversations"), row)
    better, worse = (the_answer(_as_messages(row, name), name) for name in ("chosen", "rejected"))
    return _pair(row, prompt, better, worse)


def read_ranked(row: RawColumns, template: str | None) -> Row:
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


def read_single(row: RawColumns, template: str | None, *, labelled: bool) -> Row:
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


def read_answer(row: RawColumns, template: str | None) -> Row:
    prompt = _prompt_text(row, template, field="question")
    answer = fields.filled_text(row, "answer")
    return Row(prompt=prompt, responses=(answer,), levels=(0,), system=_system(row), tools=fields.tools(row))


def read_conversation(row: RawColumns, template: str | None, *, field: str) -> Row:
    conversation = fields.messages(row, field)
    if len(conversation) < 2:
        raise BadRow("no_prompt", f"'{field}' holds a single message, so there is no prompt", field)
    answer = as_answer(conversation[-1], f"{field}[{len(conversation) - 1}]")
    prompt = _with_system(conversation[:-1], row)
    return Row(prompt=prompt, responses=(answer,), levels=(0,), tools=fields.tools(row))
