"""A few hundred raw rows at a time, from what the file holds to token ids: the work that runs in parallel.

What becomes of a row depends on that row and the settings alone, so neither the number of workers nor the way rows
are cut into chunks can change the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from dpo_cli.data.arrow_store import StoredRow, record_batch
from dpo_cli.data.fields import decode_json_row
from dpo_cli.data.formats import FORMAT_BY_NAME, Format, rename_columns
from dpo_cli.data.kinds import Draft, Skipped, check_prompt, drafts_of
from dpo_cli.data.reference_columns import fit_reference
from dpo_cli.data.render import Rendered, TemplateTraits, render, uses_chat
from dpo_cli.data.rows import BadRow, RawRow
from dpo_cli.data.settings import RowSettings
from dpo_cli.data.token_weights import difference_weights
from dpo_cli.data.tokenise import EndOfReply, Ids, Tokens, TooLong, assemble, encode, fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "error" ends the run whatever data.on_bad_row says; "bad" is an error unless it says drop.
Effect = Literal["error", "bad", "dropped", "cut", "noticed"]


class Event(NamedTuple):
    """Something worth counting about a row. reason: a key of reasons.REASONS; field and detail: for the message."""

    number: int
    effect: Effect
    reason: str
    detail: str = ""
    field: str | None = None


@dataclass(frozen=True)
class Chunk:
    """Rows of one source.

    source: its place in the list of sources. copies: how often each row is taken.
    held_out_fraction: how much of it, by prompt, goes to evaluation.
    """

    source: int
    format_name: str
    rows: Sequence[RawRow]
    copies: Sequence[int]
    held_out_fraction: float


@dataclass
class ChunkResult:
    """What became of a chunk: the examples kept, those held out for evaluation, in the order of the rows; events."""

    source: int
    read: int
    kept: pa.RecordBatch
    held_out: pa.RecordBatch
    events: list[Event]
    chat_examples: int
    plain_examples: int


@dataclass
class _Gathered:
    kept: list[StoredRow] = field(default_factory=list)
    held_out: list[StoredRow] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    chat_examples: int = 0
    plain_examples: int = 0


@dataclass(frozen=True)
class Tokeniser:
    """Everything a worker needs. leading: the BOS of plain text; template: None where nothing is rendered as chat."""

    tokenizer: PreTrainedTokenizerBase
    settings: RowSettings
    eos: int
    leading: tuple[int, ...]
    template: TemplateTraits | None

    def process(self, chunk: Chunk) -> ChunkResult:
        result = _Gathered()
        known = FORMAT_BY_NAME[chunk.format_name]
        rendered: list[tuple[int, int, Draft, Rendered]] = []
        for raw, copies in zip(chunk.rows, chunk.copies, strict=True):
            try:
                # All of a row's examples or none: the list is whole before any of it is taken.
                rendered += [(raw.number, copies, draft, self._render(draft)) for draft in self._drafts(raw, known)]
            except BadRow as problem:
                result.events.append(Event(raw.number, "bad", problem.reason, problem.problem, problem.field))
            except Skipped as skipped:
                result.events.append(Event(raw.number, "dropped", skipped.reason))
        ids = iter(self._encode_all([item[3] for item in rendered]))
        for number, copies, draft, texts in rendered:
            encoded = [next(ids) for _ in range(1 + len(texts.full))]
            try:
                if any(isinstance(each, BadRow) for each in encoded):
                    raise next(each for each in encoded if isinstance(each, BadRow))
                row = self._keep(result, number, draft, texts, encoded)  # type: ignore[arg-type]
                held_out = chunk.held_out_fraction > fraction(self.settings.seed, "split", row.prompt_key)
                (result.held_out if held_out else result.kept).extend([row] * copies)
            except BadRow as problem:
                result.events.append(Event(number, "bad", problem.reason, problem.problem, problem.field))
            except TooLong as long:
                effect: Effect = "error" if self.settings.on_long == "error" else "dropped"
                result.events.append(Event(number, effect, long.reason, f"{long.tokens:,} tokens"))
            except Skipped as skipped:
                result.events.append(Event(number, "dropped", skipped.reason))
        # Mapping errors come before tokenising errors above; the first bad row is to be the first of the file.
        result.events.sort(key=lambda event: event.number)
        return ChunkResult(
            source=chunk.source,
            read=len(chunk.rows),
            kept=record_batch(result.kept, chunk.source),
            held_out=record_batch(result.held_out, chunk.source),
            events=result.events,
            chat_examples=result.chat_examples,
            plain_examples=result.plain_examples,
        )

    def _drafts(self, raw: RawRow, known: Format) -> Iterator[Draft]:
        if isinstance(raw.content, BadRow):
            raise raw.content
        columns = decode_json_row(raw.content) if isinstance(raw.content, bytes) else raw.content
        row = known.read(rename_columns(columns, self.settings.columns), self.settings.prompt_template)
        check_prompt(row.prompt)
        return iter(drafts_of(row, self.settings.kind, ranked_pairs=self.settings.ranked_pairs))

    def _render(self, draft: Draft) -> Rendered:
        chat = uses_chat(draft.row, self.settings.chat)
        if chat and self.template is None:
            raise BadRow("template", "it is a chat, and the tokenizer has no usable chat template", "prompt")
        return render(
            self.tokenizer,
            draft.row,
            draft.responses,
            chat=chat,
            ends_reply=self.template is None or self.template.ends_reply,
        )

    def _encode_all(self, texts: Sequence[Rendered]) -> list[Ids | BadRow]:
        flat = [text for each in texts for text in (each.prompt, *each.full)]
        try:
            return list(encode(self.tokenizer, flat))
        except Exception:  # the tokenizers library raises bare Exception; find the text that it cannot take
            return [self._encode_one(text) for text in flat]

    def _encode_one(self, text: str) -> Ids | BadRow:
        try:
            return encode(self.tokenizer, [text])[0]
        except Exception as error:
            return BadRow("tokenizer", f"the tokenizer cannot take it: {str(error).splitlines()[:1]}", "prompt")

    def _end(self, *, chat: bool) -> EndOfReply:
        stops = self.settings.stop_token_ids | {self.eos}
        if chat and self.template is not None and self.template.ends_reply:
            return EndOfReply(stops, append=None, template_tail=self.template.tail)
        return EndOfReply(stops, append=self.eos)

    def _keep(self, result: _Gathered, number: int, draft: Draft, texts: Rendered, encoded: list[Ids]) -> StoredRow:
        """Tokens to a row to store; notes and cuts to the events."""
        leading = [] if texts.chat else list(self.leading)
        tokens = assemble(encoded[0], encoded[1:], leading=leading, end=self._end(chat=texts.chat))
        row, cut = self._stored_row(number, draft, tokens, chat=texts.chat, leading=leading)
        notes = list(tokens.notes)
        if draft.row.reference is not None and draft.reference is None:
            notes.append("reference_unused")
        if texts.chat:
            result.chat_examples += 1
            if self.template is not None and not self.template.ends_reply:
                notes.append("template_without_stop")
        else:
            result.plain_examples += 1
            if draft.row.tools:
                notes.append("tools_unused")
            if draft.row.system:
                notes.append("system_unused")
            if any(text[len(texts.prompt) :].startswith(texts.prompt) for text in texts.full):
                notes.append("prompt_repeated")
            if draft.row.transcript and any("\n\nHuman:" in text[len(texts.prompt) :] for text in texts.full):
                notes.append("further_turns")
        result.events.extend(Event(number, "noticed", note) for note in notes)
        result.events.extend(Event(number, "cut", reason) for reason in cut)
        ids = b"|".join(part.tobytes() for part in (row.prompt, *row.responses))
        return row._replace(prompt_key=_hash64(texts.prompt.encode()), row_key=_hash64(ids))

    def _stored_row(
        self, number: int, draft: Draft, tokens: Tokens, *, chat: bool, leading: Ids
    ) -> tuple[StoredRow, list[str]]:
        settings = self.settings
        longest = max(map(len, tokens.responses))
        if len(tokens.prompt) + longest > settings.max_tokens and settings.on_long != "truncate":
            raise TooLong("too_long", len(tokens.prompt) + longest)
        fitted = fit(tokens, settings.max_tokens, prompt_can_be_cut=not chat, leading=leading)
        whole = list(tokens.responses)
        kept = list(fitted.responses)
        if settings.kind in ("demonstration", "ranked"):
            kept, whole = _drop_repeats(kept, whole)
        if settings.kind in ("pair", "ranked") and (len(kept) < 2 or kept[0] == kept[1]):
            raise Skipped("identical_after_cut" if fitted.right_cut else "identical")
        cut = [name for name, is_so in (("prompt_cut", fitted.left_cut), ("response_cut", fitted.right_cut)) if is_so]
        weights = None
        if settings.token_weights is not None:
            # Compared before any cut, so that what lies beyond it cannot turn a shared end into a difference.
            both = difference_weights(whole[0], whole[1], changed=settings.token_weights)
            weights = tuple(each[: len(ids)] for each, ids in zip(both, kept, strict=True))
        reference = None
        if draft.reference is not None:
            if cut:
                raise BadRow("reference", "its reference log-probs are those of the whole row, and the row was cut")
            reference = tuple(
                fit_reference(
                    logps,
                    prompt_tokens=len(fitted.prompt),
                    response_tokens=len(ids),
                    weighted=settings.token_weights is not None,
                    field=name,
                )
                for logps, ids, name in zip(draft.reference, kept, ("chosen", "rejected"), strict=True)
            )
        row = StoredRow(
            prompt=np.array(fitted.prompt, dtype=np.int32),
            responses=tuple(np.array(ids, dtype=np.int32) for ids in kept),
            weights=weights,
            desirable=draft.desirable,
            reference=reference,
            number=number,
            prompt_key=0,
            row_key=0,
        )
        return row, cut


def _drop_repeats(kept: list[Ids], whole: list[Ids]) -> tuple[list[Ids], list[Ids]]:
    """Of equal responses the first stays."""
    first = [at for at, ids in enumerate(kept) if ids not in kept[:at]]
    return [kept[at] for at in first], [whole[at] for at in first]


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def fraction(seed: int, purpose: str, *parts: int) -> float:
    """A number in [0, 1) that only its arguments decide."""
    text = ":".join(map(str, (seed, purpose, *parts)))
    return (_hash64(text.encode()) & (2**53 - 1)) / 2**53
