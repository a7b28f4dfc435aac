"""Prompts to answer, with what is right: rows of any file, and their token ids as training would see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpo_cli.data.example import IntArray
from dpo_cli.data.fields import (
    RawColumns,
    as_text,
    check_filled,
    decode_json_row,
    describe,
    filled_text,
    messages,
    need,
)
from dpo_cli.data.formats import rename_columns
from dpo_cli.data.kinds import check_prompt
from dpo_cli.data.render import TemplateTraits, probe_template, render
from dpo_cli.data.rows import BadRow, Prompt, RawRow, Row
from dpo_cli.data.settings import decode_escapes
from dpo_cli.data.sources import Source, sources_of
from dpo_cli.data.templates import fill_template, template_fields
from dpo_cli.data.tokenise import EndOfReply, Ids, assemble, encode, leading_special_ids
from dpo_cli.errors import DataError
from dpo_cli.rollout.verify import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Names under which columns are recognised, the first that a file's first row has.
PROMPT_COLUMNS = ("prompt", "question", "problem", "instruction")
TRUTH_COLUMNS = ("truth", "answer", "solution", "ground_truth")
COLUMNS = ("prompt", "truth")


@dataclass(frozen=True)
class Question:
    """One prompt. number: its place among all rows read, from 0, bad ones counted.

    truth: what is right, in the file's words. chosen: a response that came with the row. Both may be absent.
    """

    number: int
    prompt: Prompt
    truth: str | None
    origin: str
    chosen: str | None = None


@dataclass(frozen=True)
class QuestionSettings:
    """How rows are read.

    columns: the file's own names for `prompt` and `truth`, where they are not to be recognised. chosen: the column of a
    response to keep. verifier: what truths are to be compared by; None needs none.
    """

    split: str = "train"
    subset: str | None = None
    columns: Mapping[str, str] | None = None
    prompt_template: str | None = None
    chosen: str | None = None
    on_bad_row: Literal["error", "drop"] = "error"
    limit: int | None = None
    verifier: Verifier | None = None


@dataclass
class QuestionFile:
    """What was read. dropped: origins of malformed rows, where these are to be dropped."""

    questions: list[Question]
    columns: dict[str, str]
    dropped: list[str] = field(default_factory=list)

    def line(self) -> str:
        """For the screen."""
        named = ", ".join(f"{name} from '{own}'" if own != name else own for name, own in self.columns.items())
        dropped = f"; {len(self.dropped):,} malformed rows dropped, first {self.dropped[0]}" if self.dropped else ""
        return f"prompts: {len(self.questions):,} ({named}){dropped}"


def read_questions(value: Any, settings: QuestionSettings, *, where: str = "prompts") -> QuestionFile:
    """The questions that `value` names, as `data.train` names rows. Raises DataError naming file, row and field."""
    for name in settings.columns or {}:
        if name not in COLUMNS:
            raise DataError(
                f"columns maps '{name}', which is no name known here.",
                where="columns",
                hint="columns.prompt=..., columns.truth=...",
            )
    template = None if settings.prompt_template is None else decode_escapes(settings.prompt_template)
    if template is not None:
        template_fields(template)
    found = QuestionFile([], {})
    number = 0
    for source in sources_of(value, split=settings.split, subset=settings.subset, where=where):
        columns: dict[str, str] | None = None
        for raw in source.reader.rows():
            if settings.limit is not None and len(found.questions) == settings.limit:
                return found
            origin = f"{source.name} row {raw.number}"
            try:
                row = _columns(raw)
                if columns is None:
                    columns = _recognise(row, settings, template, source)
                    found.columns = found.columns or columns
                question = _question(row, columns, settings, template, number=number, origin=origin)
                if settings.verifier is not None:
                    settings.verifier.check_truth(question.truth, where=f"{source.reader.location} row {raw.number}")
                found.questions.append(question)
            except (BadRow, DataError) as problem:
                if settings.on_bad_row == "error" or (isinstance(problem, DataError) and columns is None):
                    raise _error(problem, source, raw) from None
                found.dropped.append(origin)
            number += 1
    if not found.questions:
        if found.dropped:
            raise DataError(f"All {len(found.dropped):,} rows are malformed, first {found.dropped[0]}.", where=where)
        raise DataError("There are no prompts.", where=where)
    return found


def _columns(raw: RawRow) -> RawColumns:
    if isinstance(raw.content, BadRow):
        raise raw.content
    return decode_json_row(raw.content) if isinstance(raw.content, bytes) else raw.content


def _recognise(row: RawColumns, settings: QuestionSettings, template: str | None, source: Source) -> dict[str, str]:
    """The file's own name of each canonical column that it has."""
    mapped = dict(settings.columns or {})
    rename_columns(row, sorted(mapped.items()))
    known: dict[str, str] = {}
    for name, candidates in (("prompt", PROMPT_COLUMNS), ("truth", TRUTH_COLUMNS)):
        own = mapped.get(name) or next((column for column in candidates if row.get(column) is not None), None)
        if own is not None:
            known[name] = own
    if template is not None:
        known["prompt"] = "prompt_template"
    if "prompt" not in known:
        raise DataError(
            f"No column of the prompts is recognised among {', '.join(map(str, row)) or '(none)'}.",
            where=source.reader.location,
            hint="columns.prompt=NAME names it",
        )
    if settings.chosen is not None:
        known["chosen"] = settings.chosen
    return known


def _question(
    row: RawColumns,
    columns: Mapping[str, str],
    settings: QuestionSettings,
    template: str | None,
    *,
    number: int,
    origin: str,
) -> Question:
    if template is not None:
        prompt: Prompt = fill_template(template, row)
    elif isinstance(row.get(columns["prompt"]), list):
        prompt = messages(row, columns["prompt"])
    else:
        prompt = filled_text(row, columns["prompt"])
    check_prompt(prompt)
    named = "truth" in (settings.columns or {})
    # A column that was only recognised, and that nothing is compared with, may hold anything.
    wanted = "truth" in columns and (settings.verifier is not None or named or _is_truth(row.get(columns["truth"])))
    truth = _truth(row, columns["truth"]) if wanted else None
    chosen = filled_text(row, columns["chosen"]) if "chosen" in columns else None
    return Question(number, prompt, truth, origin, chosen)


def _truth(row: RawColumns, name: str) -> str:
    value = need(row, name)
    if not _is_truth(value):
        raise BadRow("wrong_type", f"'{name}' should be text or a number, but is {describe(value)}", name)
    return check_filled(as_text(value, name) if isinstance(value, str) else str(value), name)


def _is_truth(value: object) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool) and value != ""


def _error(problem: BadRow | DataError, source: Source, raw: RawRow) -> DataError:
    if isinstance(problem, DataError):
        return problem
    place = f"{source.reader.location} row {raw.number}"
    return DataError(
        f"A row of the prompts cannot be used: {problem}.",
        where=place if problem.field is None else f"{place}, field {problem.field}",
        hint="mend the row, or on_bad_row=drop",
    )


class Encoder:
    """Prompts to token ids, and back from a response to text: as the data room tokenises rows for training.

    chat: True renders text as a user's message, None messages only.
    Raises DataError where chats are to be rendered and the tokenizer cannot.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: frozenset[int],
        *,
        chat: bool | None,
        prompts: Sequence[Prompt],
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = stop_token_ids
        self._chat = chat
        self._leading = leading_special_ids(tokenizer)
        self._template: TemplateTraits | None = None
        if chat or any(not isinstance(prompt, str) for prompt in prompts):
            if chat is False:
                raise DataError(
                    "The prompts are messages, which only a chat template can render, and chat is false.", where="chat"
                )
            self._template = probe_template(tokenizer, stop_token_ids)

    def is_chat(self, prompt: Prompt) -> bool:
        return bool(self._chat) or not isinstance(prompt, str)

    def prompt(self, prompt: Prompt) -> IntArray:
        """Raises BadRow when the chat template cannot render it."""
        rendered = render(self.tokenizer, Row(prompt, (), ()), (), chat=self.is_chat(prompt), ends_reply=True)
        ids = encode(self.tokenizer, [rendered.prompt])[0]
        return np.array(ids if rendered.chat else self._with_leading(ids), dtype=np.int32)

    def _with_leading(self, ids: Ids) -> Ids:
        return ids if ids[: len(self._leading)] == self._leading else self._leading + ids

    def texts(self, prompt: IntArray, responses: Sequence[IntArray]) -> list[str]:
        """What responses say, special tokens left out.

        Read after their prompt where that can be told apart: some tokenizers drop a blank at the beginning of a text.
        """
        before = self._decode(prompt)
        found = []
        for response in responses:
            whole = self._decode(np.concatenate([prompt, response]))
            found.append(whole[len(before) :] if whole.startswith(before) else self._decode(response))
        return found

    def _decode(self, ids: IntArray) -> str:
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def trains_as_sampled(self, prompt: Prompt, prompt_ids: IntArray, text: str, response: IntArray) -> bool:
        """Whether a response's text becomes, as training data, the very ids that were sampled."""
        chat = self.is_chat(prompt)
        ends_itself = chat and self._template is not None and self._template.ends_reply
        eos = self.tokenizer.eos_token_id
        eos = min(self.stop_token_ids) if eos is None else eos
        end = EndOfReply(
            self.stop_token_ids | {eos},
            append=None if ends_itself else eos,
            template_tail=self._template.tail if ends_itself and self._template is not None else (),
        )
        ends_reply = self._template is None or self._template.ends_reply
        try:
            rendered = render(self.tokenizer, Row(prompt, (), ()), (text,), chat=chat, ends_reply=ends_reply)
            encoded = encode(self.tokenizer, [rendered.prompt, *rendered.full])
            tokens = assemble(encoded[0], encoded[1:], leading=[] if chat else self._leading, end=end)
        except BadRow:
            return False
        return tokens.prompt == prompt_ids.tolist() and tokens.responses[0] == response.tolist()
