"""Reading rows from files, a few hundred at a time, so that memory does not grow with their number.

JSON, JSONL and CSV are parsed here rather than by a library: a malformed row must be named by file, row and field.
Row numbers are 1-based; in JSONL they are line numbers, so that an editor finds the row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dpo_cli.data.fields import as_columns
from dpo_cli.data.rows import BadRow, RawRow
from dpo_cli.errors import DataError

_READ_BYTES = 1 << 20
_ROWS_AT_ONCE = 256


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


class _FileReader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self.files: tuple[Path, ...] = (path,)
        self.identity = type(self).__name__

    @property
    def bytes_on_disk(self) -> int:
        return self.path.stat().st_size

    def _open(self) -> BinaryIO:
        try:
            if self.path.suffix == ".gz":
                return cast(BinaryIO, gzip.open(self.path, "rb"))
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"The data file cannot be read: {error.strerror}.", where=self.location) from None

    def _damaged(self, error: Exception, row: int | None = None) -> DataError:
        lines = str(error).strip().splitlines()
        where = self.location if row is None else f"{self.location} row {row}"
        return DataError(f"The data file is damaged: {lines[0] if lines else type(error).__name__}", where=where)


class JsonReader(_FileReader):
    """One JSON array of objects, or one object a line, whatever the file's ending says."""

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        with self._open() as file:
            try:
                start = file.read(4096)
                is_array = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
                file.seek(0)
                yield from self._array(file) if is_array else self._lines(file)
            except (EOFError, gzip.BadGzipFile) as error:
                raise self._damaged(error) from None

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


class CsvReader(_FileReader):
    """Comma- or tab-separated values with a header row; cells may hold line breaks inside quotes."""

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        csv.field_size_limit(1 << 30)  # the default refuses a cell of 128 kB, which a long chat exceeds
        delimiter = "\t" if ".tsv" in self.path.suffixes else ","
        with self._open() as raw:
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
                raise self._damaged(error, number + 1) from None
            except (EOFError, gzip.BadGzipFile) as error:
                raise self._damaged(error, number + 1) from None

    def _columns(self, header: list[str], cells: list[str]) -> Any:
        if len(cells) != len(header):
            field = header[min(len(cells), len(header) - 1)]
            return BadRow("missing_field", f"the row has {len(cells)} cells and the header {len(header)}", field)
        # An empty cell is how CSV writes "nothing here"; a required field then reads as empty text, not as absent.
        return dict(zip(header, cells, strict=True))


class ParquetReader(_FileReader):
    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                names = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
                    for row in batch.to_pylist():
                        number += 1
                        yield RawRow(number, row)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._damaged(error, number + 1 if number else None) from None


class ArrowReader(_FileReader):
    """A bare .arrow file, as `datasets` writes its shards."""

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        import pyarrow as pa
        from datasets import Dataset

        try:
            dataset = Dataset.from_file(str(self.path))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        yield from _dataset_rows(dataset, columns, self._damaged)


class DatasetReader:
    """A split that the `datasets` library has opened: a saved folder, a folder of files, or a hub data set."""

    def __init__(
        self, dataset: Any, *, location: str, files: tuple[Path, ...], identity: str, has_splits: bool
    ) -> None:
        self.dataset = dataset
        self.has_splits = has_splits
        self.location = location
        self.files = files
        self.identity = identity

    @property
    def bytes_on_disk(self) -> int:
        return int(self.dataset.data.nbytes)

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        def damaged(error: Exception, row: int | None = None) -> DataError:
            return DataError(f"The data set is damaged: {error}", where=f"{self.location} row {row}")

        yield from _dataset_rows(self.dataset, columns, damaged)


def _dataset_rows(dataset: Any, columns: frozenset[str] | None, damaged: Any) -> Iterator[RawRow]:
    import pyarrow as pa

    if columns is not None:
        dataset = dataset.select_columns([name for name in dataset.column_names if name in columns])
    number = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            for row in table.to_pylist():
                number += 1
                yield RawRow(number, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(error, number + 1) from None


def open_folder(folder: Path, *, split: str, subset: str | None) -> DatasetReader:
    """A folder that `datasets` saved, or one of plain files that it can load."""
    import datasets

    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder), **_part(subset))
    except Exception as error:  # the library raises anything from OSError to its own builders' errors
        raise DataError(
            f"The data folder cannot be read: {_last_line(error)}",
            where=str(folder),
            hint="a folder saved with Dataset.save_to_disk, or one of jsonl, json, csv or parquet files",
        ) from error
    has_splits = isinstance(loaded, dict)
    if has_splits:
        if split not in loaded:
            raise DataError(
                f"The data folder has no split '{split}'.",
                where=str(folder),
                hint=f"data.split= one of {', '.join(map(str, loaded))}",
            )
        loaded = loaded[split]
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    location = f"{folder}[{split}]" if has_splits else str(folder)
    return DatasetReader(
        loaded, location=location, files=files, identity=f"folder:{split}:{subset}", has_splits=has_splits
    )


def open_hub(name: str, *, split: str, subset: str | None) -> DatasetReader:
    """A data set of the Hugging Face hub, or of its local cache. Raises DataError when it cannot be had."""
    import datasets

    location = f"{name}[{split}]" if subset is None else f"{name}/{subset}[{split}]"
    try:
        dataset = datasets.load_dataset(name, split=split, **_part(subset))
    except Exception as error:  # connection, authorisation, unknown names and splits all have trees of their own
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise DataError(
            f"The data set '{name}' cannot be had from the Hugging Face hub: {_last_line(error)}",
            where=location,
            hint="HF_HUB_OFFLINE is set and it is not in the local cache"
            if offline
            else "check the name, the split, the network and your login; or download it and name its folder",
        ) from error
    identity = f"hub:{location}:{dataset._fingerprint}"
    return DatasetReader(dataset, location=location, files=(), identity=identity, has_splits=True)


def _part(subset: str | None) -> dict[str, str]:
    """How load_dataset is told of a part: a configuration by its name, a folder inside the data set by its path."""
    if subset is None:
        return {}
    return {"data_dir": subset} if "/" in subset else {"name": subset}


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
