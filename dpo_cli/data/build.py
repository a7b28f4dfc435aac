"""Reading sources through to stored examples: detection, weights, counting, and what must stop the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dpo_cli.data.arrow_store import ExampleWriter
from dpo_cli.data.chunk import Chunk, ChunkResult, Event, Tokeniser, fraction
from dpo_cli.data.fields import RawColumns, decode_json_row
from dpo_cli.data.formats import Format, columns_to_read, detect_format, rename_columns
from dpo_cli.data.kinds import check_serves
from dpo_cli.data.parallel import process_chunks, worker_count
from dpo_cli.data.render import TemplateTraits, probe_template
from dpo_cli.data.report import Count, SourceReport, SplitReport
from dpo_cli.data.rows import BadRow, RawRow
from dpo_cli.data.settings import OnBadRow, RowSettings
from dpo_cli.data.sources import Source
from dpo_cli.data.tokenise import leading_special_ids
from dpo_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Small enough that results stay in order without much waiting, large enough that sending them costs little.
_ROWS_A_CHUNK = 256
_ROWS_TO_LOOK_AT = 100


@dataclass(frozen=True)
class OpenedSource:
    source: Source
    format: Format
    first_row: RawColumns
    holds_messages: bool


def open_source(source: Source, settings: RowSettings) -> OpenedSource:
    """Recognise a source's format from its first rows.

    Raises DataError when it has no rows, no known format, or one that the loss cannot use.
    """
    rows: list[RawColumns] = []
    first_problem: tuple[int, BadRow] | None = None
    for raw in islice(source.reader.rows(), _ROWS_TO_LOOK_AT):
        try:
            rows.append(rename_columns(columns_of(raw), settings.columns))
        except BadRow as problem:
            first_problem = first_problem or (raw.number, problem)
    if not rows:
        if first_problem is None:
            raise DataError("The data has no rows.", where=source.reader.location)
        raise bad_row_error(
            Event(first_problem[0], "bad", "", str(first_problem[1]), first_problem[1].field), source, ()
        )
    found = detect_format(
        rows,
        mapped=frozenset(canonical for canonical, _ in settings.columns),
        prompt_template=settings.prompt_template,
        where=source.reader.location,
    )
    check_serves(found, settings.kind, where=source.reader.location)
    return OpenedSource(source, found, rows[0], _holds_messages(found, rows, settings.prompt_template))


def columns_of(raw: RawRow) -> RawColumns:
    """Raises BadRow for what is no row."""
    if isinstance(raw.content, BadRow):
        raise raw.content
    return decode_json_row(raw.content) if isinstance(raw.content, bytes) else raw.content


def _holds_messages(found: Format, rows: Sequence[RawColumns], prompt_template: str | None) -> bool:
    for row in rows:
        try:
            return not isinstance(found.read(row, prompt_template).prompt, str)
        except BadRow:
            continue
    return False


def make_tokeniser(
    tokenizer: PreTrainedTokenizerBase, settings: RowSettings, opened: Sequence[OpenedSource]
) -> Tokeniser:
    """Learn what the tokenizer does by itself. Raises DataError when chats are to be rendered and cannot be."""
    eos = tokenizer.eos_token_id
    if eos is None:
        if not settings.stop_token_ids:
            raise DataError(
                "The tokenizer has no end-of-text token, so no reply would learn to end.", where="tokenizer"
            )
        eos = min(settings.stop_token_ids)
    template: TemplateTraits | None = None
    if settings.chat or any(each.holds_messages for each in opened):
        if settings.chat is False:
            named = next(each.source.reader.location for each in opened if each.holds_messages)
            raise DataError(
                "The rows hold messages, which only a chat template can render, and data.chat is false.",
                where=named,
                hint="data.chat=null",
            )
        template = probe_template(tokenizer, settings.stop_token_ids | {eos})
    return Tokeniser(tokenizer, settings, eos, tuple(leading_special_ids(tokenizer)), template)


@dataclass
class SplitWriter:
    """One split being written: its file, its counts, and whether its rows bring reference log-probs."""

    writer: ExampleWriter
    report: SplitReport = field(default_factory=SplitReport)
    first_with_reference: str | None = None
    first_without: str | None = None

    def write(self, batch: pa.RecordBatch, source_name: str) -> None:
        self.writer.write(batch)
        self.report.examples += batch.num_rows
        if batch.num_rows:
            self._check_reference(batch, source_name)

    def _check_reference(self, batch: pa.RecordBatch, source_name: str) -> None:
        has = np.diff(batch.column("reference_lengths").offsets.to_numpy()) > 0
        numbers = batch.column("number").to_numpy()
        if has.any():
            self.first_with_reference = self.first_with_reference or f"{source_name} row {numbers[has][0]}"
        if not has.all():
            self.first_without = self.first_without or f"{source_name} row {numbers[~has][0]}"
        if self.first_with_reference and self.first_without:
            raise DataError(
                "Some rows bring reference log-probs and others do not.",
                where=f"with: {self.first_with_reference}; without: {self.first_without}",
                hint="bring them for every row, or leave the columns out and let them be scored",
            )
        self.report.reference = self.first_with_reference is not None


def build_split(
    opened: Sequence[OpenedSource],
    tokeniser: Tokeniser,
    *,
    first_source: int,
    into: SplitWriter,
    held_out: SplitWriter | None,
    held_out_fraction: float,
    on_bad_row: OnBadRow,
    workers: int | None,
) -> None:
    """Tokenise sources into one split, and by prompt into a held-out one.

    first_source: the number of the first of these sources among all.
    Raises DataError for a bad row, unless these are to be dropped.
    """
    reports = [SourceReport(each.source.name, each.format.name, each.source.weight) for each in opened]
    into.report.sources += reports
    size = sum(each.source.reader.bytes_on_disk for each in opened)
    count = worker_count(workers, bytes_on_disk=size, tokenizer=tokeniser.tokenizer)
    chunks = _chunks(opened, reports, tokeniser.settings, first_source, held_out_fraction)
    for result in process_chunks(chunks, tokeniser, workers=count):
        at = result.source - first_source
        source = opened[at].source
        _count_events(result, source, into.report, tokeniser.settings, on_bad_row)
        reports[at].chat_examples += result.chat_examples
        reports[at].plain_examples += result.plain_examples
        into.write(result.kept, source.name)
        if held_out is not None:
            held_out.write(result.held_out, source.name)


def _chunks(
    opened: Sequence[OpenedSource],
    reports: Sequence[SourceReport],
    settings: RowSettings,
    first_source: int,
    held_out_fraction: float,
) -> Iterator[Chunk]:
    for at, each in enumerate(opened):
        number = first_source + at
        columns = columns_to_read(each.format, settings.columns, settings.prompt_template)
        stream = each.source.reader.rows(columns)
        while rows := list(islice(stream, _ROWS_A_CHUNK)):
            reports[at].rows += len(rows)
            copies = [_copies(each.source.weight, settings.seed, number, row.number) for row in rows]
            taken = [(row, times) for row, times in zip(rows, copies, strict=True) if times]
            if taken:
                yield Chunk(number, each.format.name, [r for r, _ in taken], [t for _, t in taken], held_out_fraction)


def _copies(weight: float, seed: int, source: int, number: int) -> int:
    """How often a row is taken: the weight's whole part, and once more for the rest's share of the rows."""
    whole = int(weight)
    rest = weight - whole
    return whole + (rest > 0 and fraction(seed, "weight", source, number) < rest)


def _count_events(
    result: ChunkResult, source: Source, report: SplitReport, settings: RowSettings, on_bad_row: OnBadRow
) -> None:
    for event in result.events:
        if event.effect == "error":
            raise DataError(
                f"A row needs {event.detail}, more than data.max_tokens={settings.max_tokens}.",
                where=f"{source.reader.location} row {event.number}",
                hint="raise data.max_tokens, or data.on_long=drop, or data.on_long=truncate",
            )
        if event.effect == "bad" and on_bad_row == "error":
            raise bad_row_error(event, source, settings.columns)
        counts = {"cut": report.cut, "noticed": report.noticed}.get(event.effect, report.dropped)
        counts.setdefault(event.reason, Count()).add(f"{source.name} row {event.number}")


def bad_row_error(event: Event, source: Source, columns: Sequence[tuple[str, str]]) -> DataError:
    place = f"{source.reader.location} row {event.number}"
    if event.field is not None:
        place += f", field {event.field}"
        own = dict(columns).get(event.field, event.field)
        place += f" (the column {own})" if own != event.field else ""
    return DataError(
        f"A row of the data cannot be used: {event.detail}.", where=place, hint="mend the row, or data.on_bad_row=drop"
    )
