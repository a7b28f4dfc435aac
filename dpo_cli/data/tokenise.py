"""From rendered text to ids: where the response begins, what ends it, and what is cut when it is too long.

The boundary is the common prefix of the prompt's own tokens and of every prompt + response: a tokenizer may merge the
prompt's last character with the response's first, and what differs between responses must be scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_cli.data.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


@dataclass(frozen=True)
class EndOfReply:
    """How a reply ends.

    stops: any of these ends it; nothing after the first one is scored.
    append: added after a text that does not end itself (plain text, a template without an end of turn), else None.
    template_tail: what a chat template puts after its stop token, usually a line break.
    """

    stops: frozenset[int]
    append: int | None
    template_tail: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """A prompt and its responses as ids, before any cut. Notes are keys of reasons.REASONS."""

    prompt: Ids
    responses: tuple[Ids, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """Ids that fit max_tokens. left_cut, right_cut: whether the prompt's beginning or a response's end was cut."""

    prompt: Ids
    responses: tuple[Ids, ...]
    left_cut: bool = False
    right_cut: bool = False


class TooLong(Exception):
    """An example does not fit. reason: a key of reasons.REASONS; tokens: what it would have needed."""

    def __init__(self, reason: str, tokens: int) -> None:
        super().__init__(reason, tokens)
        self.reason = reason
        self.tokens = tokens


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Ids of each text, with no special token but those written in it."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """What the tokenizer puts before plain text by itself: its BOS, or nothing."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return list(whole[:at])
    return []


def common_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, sequences))
    first = np.asarray(sequences[0][:shortest])
    for other in sequences[1:]:
        different = np.nonzero(first[:shortest] != np.asarray(other[:shortest]))[0]
        if len(different):
            shortest = int(different[0])
    return shortest


def assemble(prompt: Ids, full: Sequence[Ids], *, leading: Ids, end: EndOfReply) -> Tokens:
    """Cut prompt + response into prompt and response, and end every response exactly once.

    prompt, full: ids of the prompt alone and of prompt + each response. leading: BOS of plain text, or nothing.
    Raises BadRow when a prompt or response keeps no token.
    """
    boundary = common_prefix_length([prompt, *full])
    notes = []
    if boundary < len(prompt):
        notes.append("boundary_shifted")
    responses = []
    for whole in full:
        response, cut_short = _end_once(whole[boundary:], end)
        if cut_short:
            notes.append("text_after_stop")
        if not response or (len(response) == 1 and response[0] in end.stops):
            raise BadRow("empty", "a response has no tokens of its own", None)
        responses.append(response)
    begun = prompt[:boundary]
    if leading and begun[: len(leading)] != leading:
        begun = leading + begun
    if not begun:
        raise BadRow("no_prompt", "no token of the prompt is left before the responses differ", "prompt")
    return Tokens(begun, tuple(responses), tuple(dict.fromkeys(notes)))


def _end_once(response: Ids, end: EndOfReply) -> tuple[Ids, bool]:
    """(ids up to and with the first stop token, whether words came after it)."""
    for at, token in enumerate(response):
        if token in end.stops:
            # A text that brought its own stop token shows two in a row; that is no loss of words.
            after = tuple(other for other in response[at + 1 :] if other not in end.stops)
            return response[: at + 1], after not in ((), end.template_tail)
    return (response if end.append is None else [*response, end.append]), False


def fit(tokens: Tokens, max_tokens: int, *, prompt_can_be_cut: bool, leading: Ids) -> Fitted:
    """Cut what does not fit: the responses' ends where the prompt fits, else the prompt's beginning as well.

    prompt_can_be_cut: plain text only; half a chat is no chat. leading: the BOS that a cut prompt keeps.
    Raises TooLong when that is not allowed. At least half of max_tokens stays with the prompt's end, which holds the
    turn header, and every response keeps a token.
    """
    longest = max(map(len, tokens.responses))
    prompt = tokens.prompt
    if len(prompt) + longest <= max_tokens:
        return Fitted(prompt, tokens.responses)
    left_cut = len(prompt) >= max_tokens
    if left_cut:
        kept = max_tokens - min(longest, max(1, max_tokens // 2)) - len(leading)
        if not prompt_can_be_cut or kept < 1:
            raise TooLong("prompt_too_long", len(prompt) + longest)
        prompt = leading + prompt[len(prompt) - kept :]
    room = max_tokens - len(prompt)
    return Fitted(prompt, tuple(ids[:room] for ids in tokens.responses), left_cut, right_cut=longest > room)
