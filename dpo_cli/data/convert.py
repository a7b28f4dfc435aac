"""Rows of any supported form, written in one, as JSONL or Parquet: a prompt with what is said to it.

What is written gives the same tokens as what was read, under the same settings: the canonical rows are written that
reading makes, so there is no second reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from dpo_cli.atomic import replacing
from dpo_cli.data.build import OpenedSource, bad_row_error, columns_of, open_source
from dpo_cli.data.chunk import Event
from dpo_cli.data.formats import Content, check_column_names, columns_to_read, rename_columns
from dpo_cli.data.kinds import check_prompt
from dpo_cli.data.reasons import REASONS
from dpo_cli.data.reference_columns import RLAIFV_COLUMNS
from dpo_cli.data.render import answer_message, prompt_messages
from dpo_cli.data.report import Count
from dpo_cli.data.rows import BadRow, Messages, Prompt, Response, Row
from dpo_cli.data.settings import DataConfig, RowSettings, row_settings
from dpo_cli.data.sources import sources_of
from dpo_cli.errors import DataError

Columns = dict[str, Any]
_ROWS_A_GROUP = 4096
_FORMS: dict[Content, str] = {
    "preferences": "prompt/chosen/rejected",
    "ranked": "prompt/responses, ranked",
    "unpaired": "prompt/completion/label",
    "demonstrations": "prompt/completion",
}


@dataclass
class Converted:
    """What was written to `out`, and what was not: rows by reason. sources: (name, format) of each."""

    out: Path
    sources: list[tuple[str, str]]
    form: str
    rows: int = 0
    dropped: dict[str, Count] = field(default_factory=dict)

    def lines(self) -> list[str]:
        read = ", ".join(f"{name} ({form})" for name, form in self.sources)
        told = [f"{self.out}: {self.rows:,} rows, {self.form}, from {read}"]
        for reason, count in self.dropped.items():
            told.append(f"  dropped {count.rows:,} {REASONS[reason]} (first: {', '.join(count.first[:2])})")
        return told


def convert(data: DataConfig, out: Path) -> Converted:
    """Write the rows of data.train to `out`, whole or not at all; each once, whatever the weight of its source.

    data.columns, data.prompt_template and data.chat mean what they mean in training: a filled template is written, and
    with chat=true text becomes messages. Raises DataError for rows that cannot be used, unless these are to be dropped,
    and for sources that one form cannot hold together.
    """
    # Any format may become demonstrations, so none is refused here.
    settings = row_settings(data, kind="demonstration", stop_token_ids=frozenset(), seed=0)
    check_column_names(settings.columns)
    opened = [
        open_source(source, settings)
        for source in sources_of(data.train, split=data.split, subset=data.subset, where="data.train")
    ]
    contents = list(dict.fromkeys(each.format.content for each in opened))
    if len(contents) > 1:
        raise DataError(
            f"One file cannot hold rows of {' and '.join(_FORMS[each] for each in contents)}.",
            where=", ".join(each.source.name for each in opened),
            hint="convert the sources one by one",
        )
    converted = Converted(out, [(each.source.name, each.format.name) for each in opened], _FORMS[contents[0]])
    rows = _rows(opened, settings, converted, drops=data.on_bad_row == "drop")
    first = next(rows, None)
    if first is None:
        raise DataError("Nothing is left to write: every row was dropped.", where=converted.sources[0][0])
    place, row = first
    converted.form += " text" if isinstance(row["prompt"], str) else " messages"
    out.parent.mkdir(parents=True, exist_ok=True)
    opens = _parquet_writer if out.suffix == ".parquet" else _jsonl_writer
    with replacing(out) as temporary, opens(temporary) as write:
        everything = _alike(chain([(place, row)], rows))
        while group := list(islice(everything, _ROWS_A_GROUP)):
            write(group)
            converted.rows += len(group)
    return converted


Placed = tuple[str, Columns]


def _rows(
    opened: Sequence[OpenedSource], settings: RowSettings, converted: Converted, *, drops: bool
) -> Iterator[Placed]:
    """(file and row, its columns), source after source."""
    for each in opened:
        wanted = columns_to_read(each.format, settings.columns, settings.prompt_template)
        for raw in each.source.reader.rows(wanted):
            place = f"{each.source.name} row {raw.number}"
            try:
                row = each.format.read(rename_columns(columns_of(raw), settings.columns), settings.prompt_template)
                check_prompt(row.prompt)
                yield place, _canonical(row, each.format.content, chat=bool(settings.chat))
            except BadRow as problem:
                if not drops:
                    event = Event(raw.number, "bad", problem.reason, problem.problem, problem.field)
                    raise bad_row_error(event, each.source, settings.columns) from None
                converted.dropped.setdefault(problem.reason, Count()).add(place)


def _canonical(row: Row, content: Content, *, chat: bool) -> Columns:
    """The columns of a row; those that it has no use for are left out."""
    prompt: Prompt = row.prompt
    responses: tuple[Response | Messages, ...] = row.responses
    if chat or not isinstance(prompt, str):
        prompt = prompt_messages(row)
        responses = tuple([answer_message(each, transcript=row.transcript)] for each in row.responses)
    columns: Columns = {"prompt": prompt}
    if content == "preferences":
        columns["chosen"], columns["rejected"] = responses
    elif content == "ranked":
        # Ties have equal scores; the responses already stand best first.
        columns |= {"responses": list(responses), "scores": [-float(level) for level in row.levels]}
    else:
        columns["completion"] = responses[0]
    if row.label is not None:
        columns["label"] = row.label
    if row.system is not None and isinstance(prompt, str):
        columns["system"] = row.system
    if row.tools is not None:
        columns["tools"] = json.dumps(row.tools, ensure_ascii=False)
    for logps, names in zip(row.reference or (), (RLAIFV_COLUMNS[:3], RLAIFV_COLUMNS[3:]), strict=False):
        values = (logps.total, logps.average, None if logps.per_token is None else list(logps.per_token))
        columns |= {name: value for name, value in zip(names, values, strict=True) if value is not None}
    return columns


def _alike(rows: Iterator[Placed]) -> Iterator[Placed]:
    """Raises DataError where some prompts are text and others messages: a format holds for all of a file."""
    kind: type | None = None
    for place, columns in rows:
        kind = kind or type(columns["prompt"])
        if type(columns["prompt"]) is not kind:
            raise DataError(
                "Some rows are text and others are messages.", where=place, hint="data.chat=true makes messages of all"
            )
        yield place, columns


Write = Callable[[Sequence[Placed]], None]


@contextmanager
def _jsonl_writer(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(f"{json.dumps(columns, ensure_ascii=False)}\n" for _, columns in rows)


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Write]:
    """The first group of rows decides the columns."""
    writer: parquet.ParquetWriter | None = None

    def write(rows: Sequence[Placed]) -> None:
        nonlocal writer
        if writer is None:
            seen = {name: value for _, columns in rows for name, value in columns.items()}
            writer = parquet.ParquetWriter(path, pa.schema([(name, _type(value)) for name, value in seen.items()]))
        for place, columns in rows:
            _check_fits(columns, set(writer.schema.names), place)
        writer.write_table(pa.Table.from_pylist([columns for _, columns in rows], schema=writer.schema))

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def _type(value: Any) -> pa.DataType:
    if isinstance(value, list):
        return pa.list_(_type(value[0]))
    return {dict: _MESSAGE, str: pa.string(), bool: pa.bool_(), float: pa.float64()}[type(value)]


def _check_fits(columns: Columns, known: set[str], place: str) -> None:
    """Raises DataError for what a table would drop in silence: columns that come late, keys that messages share not."""
    late = set(columns) - known
    keys = {key for value in columns.values() for message in _messages_in(value) for key in message}
    extra = late or keys - {"role", "content"}
    if extra:
        raise DataError(
            f"A Parquet table of these rows has no place for {', '.join(sorted(extra))}.",
            where=place,
            hint="out=....jsonl, where every row may have its own",
        )


def _messages_in(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _messages_in(each)
