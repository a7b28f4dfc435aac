"""Finding where the prompt ends when a row holds whole conversations, as messages or as a transcript."""

from __future__ import annotations

import re

from dpo_cli.data.rows import BadRow, Message, Messages, Response

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"


def is_transcript(value: object) -> bool:
    """Whether a text is a dialogue in the form of Anthropic's HH data."""
    return isinstance(value, str) and HUMAN_TURN in value and ASSISTANT_TURN in value


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected): the prompt ends with the last "\\n\\nAssistant:" that both share.

    A shared text that is no turn boundary belongs to the responses: "I think" may well begin both answers.
    """
    length = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if length is None else length]
    end = shared.rfind(ASSISTANT_TURN)
    if end < 0:
        raise BadRow(
            "no_prompt", f"'chosen' and 'rejected' share no {ASSISTANT_TURN!r}, so there is no prompt", "chosen"
        )
    end += len(ASSISTANT_TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def transcript_messages(transcript: str) -> Messages:
    """The turns of a transcript that ends in "\\n\\nAssistant:", as messages, without that open turn."""
    pieces = re.split(r"\n\n(Human|Assistant):", transcript)
    opening, turns = pieces[0], list(zip(pieces[1::2], pieces[2::2], strict=True))
    if turns and turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        turns.pop()
    messages: Messages = [{"role": "system", "content": opening.strip()}] if opening.strip() else []
    roles = {"Human": "user", "Assistant": "assistant"}
    return messages + [{"role": roles[name], "content": said.strip()} for name, said in turns]


def split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Message, Message]:
    """(prompt, chosen, rejected) of two whole conversations: the prompt is the messages that both begin with."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise BadRow(
            "no_prompt", "'chosen' and 'rejected' begin with different messages, so there is no prompt", "chosen"
        )
    return chosen[:shared], the_answer(chosen[shared:], "chosen"), the_answer(rejected[shared:], "rejected")


def the_answer(messages: Messages, field: str) -> Message:
    """The single assistant message that a response must be; anything more would be scored as if it were its words."""
    if len(messages) != 1:
        raise BadRow(
            "many_turns",
            f"'{field}' answers with {len(messages)} messages; only a single assistant message can be scored",
            field,
        )
    return as_answer(messages[0], field)


def as_answer(message: Message, field: str) -> Message:
    if message["role"] != "assistant":
        raise BadRow("wrong_type", f"'{field}' ends with a message of the {message['role']}, not the assistant", field)
    if not message["content"].strip() and "tool_calls" not in message:
        raise BadRow("empty", f"'{field}' is empty", field)
    return message


def strip_prompt(prompt: Messages, response: Messages, field: str) -> Message:
    """A response that may repeat the prompt's messages first, without them."""
    if len(response) > len(prompt) and response[: len(prompt)] == prompt:
        response = response[len(prompt) :]
    return the_answer(response, field)


def response_text(response: Response) -> str:
    return response if isinstance(response, str) else str(response.get("content", ""))
