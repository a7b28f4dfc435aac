"""JSON and JSONL, row by row, without ever holding a whole file."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from dpo_cli.data.fields import as_columns
from dpo_cli.data.readers import FileReader
from dpo_cli.data.rows import BadRow, RawRow
from dpo_cli.errors import DataError

_READ_BYTES = 1 << 20


class JsonReader(FileReader):
    """One JSON array of objects, or one object a line, whatever the file's ending says."""

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        with self.open() as file:
            try:
                start = file.read(4096)
                is_array = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
                file.seek(0)
                yield from self._array(file) if is_array else self._lines(file)
            except (EOFError, gzip.BadGzipFile) as error:
                raise self.damaged(error) from None

    def _lines(self, file: BinaryIO) -> Iterator[RawRow]:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.isspace():
                yield RawRow(number, line)

    def _array(self, file: BinaryIO) -> Iterator[RawRow]:
        """The array's elements. Raises DataError where it is no JSON: past that place rows cannot be told apart."""
        pieces = codecs.iterdecode(iter(lambda: file.read(_READ_BYTES), b""), "utf-8-sig", errors="surrogateescape")
        decode = json.JSONDecoder().raw_decode
        text = next(pieces, "").lstrip()
        at, number, value_is_next = 1, 1, True
        while True:
            at = _skip_space(text, at)
            mark = text[at : at + 1]
            if mark == "]" and (number == 1 or not value_is_next):
                break
            if mark == "," and not value_is_next:
                at, value_is_next = at + 1, True
                continue
            if mark and not value_is_next:
                raise self._broken_array("a comma is missing before it", number)
            try:
                value, end = decode(text, at)
            except json.JSONDecodeError as error:
                more = next(pieces, None) if _may_be_unfinished(error, text) else None
                if more is None:
                    problem = error.msg if mark else "the list is not closed; the file ends too early"
                    raise self._broken_array(problem, number) from None
                text, at = text[at:] + more, 0
                continue
            except RecursionError:
                raise self._broken_array("nested too deeply", number) from None
            yield RawRow(number, _columns_or_problem(value))
            number, at, value_is_next = number + 1, end, False
        rest = text[at + 1 :] + "".join(pieces)
        if rest.strip():
            raise self._broken_array("something follows the end of the list", number)

    def _broken_array(self, problem: str, number: int) -> DataError:
        return DataError(
            f"The file is not valid JSON: {problem}.",
            where=f"{self.location} row {number}",
            hint="one object a line (JSONL) lets a bad row be dropped; a list does not",
        )


def _columns_or_problem(value: Any) -> Any:
    try:
        return as_columns(value)
    except BadRow as problem:
        return problem


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _may_be_unfinished(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more of the file could mend it: the failure is at the text's end, or in a string that has no end yet."""
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
