"""Text as the model will read it: a chat template for messages, plain text as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpo_cli.data.conversations import response_text, transcript_messages
from dpo_cli.data.rows import BadRow, Message, Messages, Response, Row
from dpo_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE_QUESTION = "How many eggs are in a dozen?"
_PROBE_ANSWER = "There are twelve eggs in a dozen."


@dataclass(frozen=True)
class Rendered:
    """prompt: the text before any response; full: prompt and response, one text a response. chat: by the template."""

    prompt: str
    full: tuple[str, ...]
    chat: bool


@dataclass(frozen=True)
class TemplateTraits:
    """What a probe of the chat template showed.

    before_reply: what it puts between the generation prompt and the reply's own words ("" for most).
    ends_reply: whether a stop token follows the reply; where none does, one is added as after plain text.
    tail: ids after that stop token.
    """

    before_reply: str
    ends_reply: bool
    tail: tuple[int, ...] = ()


def uses_chat(row: Row, chat: bool | None) -> bool:
    if isinstance(row.prompt, str):
        return bool(chat)
    if chat is False:
        raise BadRow(
            "template",
            "the row holds messages, which only a chat template can render, and data.chat is false",
            "prompt",
        )
    return True


def render(
    tokenizer: PreTrainedTokenizerBase, row: Row, responses: Sequence[Response], *, chat: bool, ends_reply: bool
) -> Rendered:
    """Render a prompt alone and with each response. Raises BadRow when the template cannot, or is unstable."""
    if not chat:
        prompt = str(row.prompt)
        return Rendered(prompt, tuple(prompt + response_text(response) for response in responses), chat=False)
    messages = prompt_messages(row)
    prompt = apply_template(tokenizer, messages, row.tools, add_generation_prompt=True)
    full = []
    for response in responses:
        answer = answer_message(response, transcript=row.transcript)
        text = apply_template(tokenizer, [*messages, answer], row.tools, add_generation_prompt=False)
        check_stable(prompt, text, answer)
        full.append(text if ends_reply else text.rstrip())
    return Rendered(prompt, tuple(full), chat=True)


def prompt_messages(row: Row) -> Messages:
    """A row's prompt as messages, plain text wrapped into them."""
    if not isinstance(row.prompt, str):
        return row.prompt
    messages = transcript_messages(row.prompt) if row.transcript else [{"role": "user", "content": row.prompt}]
    if row.system is not None:
        messages = [{"role": "system", "content": row.system}, *messages]
    if not messages or messages[-1]["role"] != "user":
        raise BadRow("no_prompt", "the transcript has no question of the human before the reply", "chosen")
    return messages


def answer_message(response: Response, *, transcript: bool) -> Message:
    """A response as the assistant's message. transcript: it may hold further turns, which one message cannot."""
    if not isinstance(response, str):
        return response
    if transcript:
        if "\n\nHuman:" in response:
            raise BadRow(
                "many_turns", "a response goes on with further turns; only one reply can be a message", "chosen"
            )
        response = response.strip()
    return {"role": "assistant", "content": response}


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, *, add_generation_prompt: bool
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # jinja raises its own tree, templates raise by hand, and filters raise anything
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise BadRow("template", f"the chat template cannot render it: {reason}", "prompt") from None
    return str(rendered)


def check_stable(prompt: str, full: str, answer: Message) -> None:
    """Raise BadRow unless the prompt's rendering begins the whole one and the reply's words are all in the rest.

    Templates that strip a <think> block, or open one only in the generation prompt, fail here: the model would be
    trained on a text that it is never asked to go on from.
    """
    if not full.startswith(prompt):
        at = next(
            (at for at, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full))
        )
        start = max(0, at - 40)
        raise BadRow(
            "unstable_template",
            "the chat template renders the prompt differently once a reply follows:\n"
            f"    prompt alone    ...{prompt[start : at + 40]!r}\n"
            f"    with the reply  ...{full[start : at + 40]!r}",
            "prompt",
        )
    said, tail = str(answer.get("content", "")), full[len(prompt) :]
    if said.strip() not in tail and "".join(said.split()) not in "".join(tail.split()):
        raise BadRow(
            "unstable_template",
            "the chat template does not render all of the reply's words:\n"
            f"    the reply       {_shorten(said)!r}\n"
            f"    rendered        {_shorten(tail)!r}",
            "chosen",
        )


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"


def probe_template(tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> TemplateTraits:
    """Render a small chat and see that the template is there, stable, and where it ends a reply.

    Raises DataError: no row could be rendered either.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The rows are chats, and the tokenizer has no chat template.",
            where="data.chat",
            hint="use a tokenizer with a chat_template, or data of plain text with data.chat=false",
        )
    question: Messages = [{"role": "user", "content": _PROBE_QUESTION}]
    answer = {"role": "assistant", "content": _PROBE_ANSWER}
    try:
        prompt = apply_template(tokenizer, question, None, add_generation_prompt=True)
        full = apply_template(tokenizer, [*question, answer], None, add_generation_prompt=False)
        check_stable(prompt, full, answer)
    except BadRow as problem:
        raise DataError(
            f"The tokenizer's chat template cannot be trained with: {problem}.",
            where="chat_template of the tokenizer",
            hint="use another chat_template, one whose prompt does not change once a reply follows",
        ) from None
    before_reply, _, after = full[len(prompt) :].partition(_PROBE_ANSWER)
    _check_one_bos(tokenizer, full)
    following = tokenizer.encode(after, add_special_tokens=False)
    stop_at = next((at for at, token in enumerate(following) if token in stop_token_ids), None)
    if stop_at is None:
        return TemplateTraits(before_reply, ends_reply=False)
    return TemplateTraits(before_reply, ends_reply=True, tail=tuple(following[stop_at + 1 :]))


def _check_one_bos(tokenizer: PreTrainedTokenizerBase, rendered: str) -> None:
    bos = tokenizer.bos_token_id
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    # Where one token both begins and ends texts, its number says nothing.
    if bos is not None and bos != tokenizer.eos_token_id and ids[:2] == [bos, bos]:
        raise DataError(
            f"The tokenizer's chat template begins with the token {tokenizer.bos_token!r} twice.",
            where="chat_template of the tokenizer",
            hint="take one of them out of the template",
        )
