"""Which files, folders and hub data sets are to be read, with their weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.data.dataset_reader import ArrowReader, open_folder, open_hub
from dpo_cli.data.json_reader import JsonReader
from dpo_cli.data.readers import CsvReader, ParquetReader, RowReader
from dpo_cli.errors import DataError
from dpo_cli.paths import resolve_path

_READERS: dict[str, type[JsonReader] | type[CsvReader] | type[ParquetReader] | type[ArrowReader]] = {
    ".json": JsonReader,
    ".jsonl": JsonReader,
    ".ndjson": JsonReader,
    ".csv": CsvReader,
    ".tsv": CsvReader,
    ".parquet": ParquetReader,
    ".arrow": ArrowReader,
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One thing to read. weight: how often an epoch takes each of its rows. name: as messages show it."""

    name: str
    reader: RowReader
    weight: float


def sources_of(value: Any, *, split: str, subset: str | None, where: str) -> list[Source]:
    """The sources that `data.train` or `data.eval` names: a string, a {path, weight, ...}, or a list of these.

    Raises DataError for a file that is not there, an unknown kind of file, or a hub data set that cannot be had.
    """
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found: list[Source] = []
    for item in listed:
        found += _open(item, split=split, subset=subset, where=where)
    if not found:
        raise DataError("No data is named.", where=where, hint=f"{where}=pairs.jsonl")
    return _distinguish(found)


def eval_sources_of(value: Any, *, split: str, subset: str | None) -> list[Source]:
    """The other split of the training data: for hub data sets and folders that have splits, nothing for the rest."""
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    paths = [item if isinstance(item, str) else _attribute(item, "path") for item in listed]
    whole = [path for path in paths if isinstance(path, str) and not Path(resolve_path(path)).expanduser().is_file()]
    found = [source for path in whole for source in _open(path, split=split, subset=subset, where="data.eval_split")]
    return _distinguish([source for source in found if getattr(source.reader, "has_splits", False)])


def _open(item: Any, *, split: str, subset: str | None, where: str) -> list[Source]:
    path = item if isinstance(item, str) else _attribute(item, "path")
    if not isinstance(path, str) or not path.strip():
        raise DataError("A source has no path.", where=where, hint="{path: pairs.jsonl, weight: 1.0}")
    weight = 1.0 if isinstance(item, str) else float(_attribute(item, "weight") or 1.0)
    if not isinstance(item, str):
        split = _attribute(item, "split") or split
        if _attribute(item, "weight") == 0 or weight < 0:
            raise DataError(
                f"The weight of {path} should be above 0.", where=where, hint="leave the source out instead"
            )
    label = None if isinstance(item, str) else _attribute(item, "name")
    resolved = resolve_path(path)
    if any(mark in resolved for mark in "*?[") and not Path(resolved).exists():
        pattern = Path(resolved).expanduser()
        files = sorted(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))
        if not files:
            raise DataError(f"No file matches {path}.", where=where)
        return [Source(each.name, _reader(each), weight) for each in files]
    local = Path(resolved).expanduser()
    reader: RowReader
    if local.is_dir():
        folder = open_folder(local, split=split, subset=subset)
        reader, name = folder, f"{local.name}[{split}]" if folder.has_splits else local.name
    elif local.is_file():
        reader, name = _reader(local), local.name
    elif _looks_like_hub_name(path):
        reader, name = open_hub(path, split=split, subset=subset), f"{path}[{split}]"
    else:
        raise _missing(local, where)
    return [Source(label or name, reader, weight)]


def _reader(path: Path) -> RowReader:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
    if kind not in _READERS:
        raise DataError(
            f"The kind of file {path.name} is not known by its ending.",
            where=str(path),
            hint=f"known endings: {', '.join(_READERS)}, the first five also with .gz",
        )
    return _READERS[kind](path)


def _looks_like_hub_name(path: str) -> bool:
    return _HUB_NAME.fullmatch(path) is not None and Path(path.removesuffix(".gz")).suffix.lower() not in _READERS


def _missing(path: Path, where: str) -> DataError:
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.parent / close[0]}?" if close else f"paths are taken from {Path.cwd()}"
    return DataError(f"The data file {path} does not exist.", where=where, hint=hint)


def _attribute(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _distinguish(sources: list[Source]) -> list[Source]:
    """Sources that share a file name are shown by their whole path."""
    names = [source.name for source in sources]
    return [
        source if names.count(source.name) == 1 else Source(source.reader.location, source.reader, source.weight)
        for source in sources
    ]
