"""Reading rows from files, a few hundred at a time, so that memory does not grow with their number.

JSON, JSONL and CSV are parsed here rather than by a library: a malformed row must be named by file, row and field.
Row numbers are 1-based; in JSONL they are line numbers, so that an editor finds the row.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dpo_cli.data.rows import BadRow, RawRow
from dpo_cli.errors import DataError

ROWS_AT_ONCE = 256


class RowReader(Protocol):
    """location: the path or hub name. files: what its content hash is taken of. identity: what else names the content.

    bytes_on_disk: to judge whether workers are worth starting.
    """

    location: str
    files: tuple[Path, ...]
    identity: str

    @property
    def bytes_on_disk(self) -> int: ...

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        """Every row, in order. columns: others may be left out."""
        ...


class FileReader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self.files: tuple[Path, ...] = (path,)
        self.identity = type(self).__name__

    @property
    def bytes_on_disk(self) -> int:
        return self.path.stat().st_size

    def open(self) -> BinaryIO:
        try:
            if self.path.suffix == ".gz":
                return cast(BinaryIO, gzip.open(self.path, "rb"))
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"The data file cannot be read: {error.strerror}.", where=self.location) from None

    def damaged(self, error: Exception, row: int | None = None) -> DataError:
        lines = str(error).strip().splitlines()
        where = self.location if row is None else f"{self.location} row {row}"
        return DataError(f"The data file is damaged: {lines[0] if lines else type(error).__name__}", where=where)


class CsvReader(FileReader):
    """Comma- or tab-separated values with a header row; cells may hold line breaks inside quotes."""

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        csv.field_size_limit(1 << 30)  # the default refuses a cell of 128 kB, which a long chat exceeds
        delimiter = "\t" if ".tsv" in self.path.suffixes else ","
        with self.open() as raw:
            file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
            table = csv.reader(file, delimiter=delimiter, strict=True)
            number = 0
            try:
                header = next(table, None)
                if header is None:
                    return
                if len(set(header)) < len(header):
                    twice = next(name for name in header if header.count(name) > 1)
                    raise DataError(f"The header names the column '{twice}' twice.", where=self.location)
                for cells in table:
                    if not cells:
                        continue
                    number += 1
                    yield RawRow(number, self._columns(header, cells))
            except csv.Error as error:
                raise self.damaged(error, number + 1) from None
            except (EOFError, gzip.BadGzipFile) as error:
                raise self.damaged(error, number + 1) from None

    def _columns(self, header: list[str], cells: list[str]) -> Any:
        if len(cells) != len(header):
            field = header[min(len(cells), len(header) - 1)]
            return BadRow("missing_field", f"the row has {len(cells)} cells and the header {len(header)}", field)
        # An empty cell is how CSV writes "nothing here"; a required field then reads as empty text, not as absent.
        return dict(zip(header, cells, strict=True))


class ParquetReader(FileReader):
    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                names = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
                    for row in batch.to_pylist():
                        number += 1
                        yield RawRow(number, row)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self.damaged(error, number + 1 if number else None) from None
