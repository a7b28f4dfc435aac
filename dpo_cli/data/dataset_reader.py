"""What the `datasets` library opens: saved folders, folders of files, single Arrow shards, the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.data.readers import ROWS_AT_ONCE, FileReader
from dpo_cli.data.rows import RawRow
from dpo_cli.errors import DataError


class ArrowReader(FileReader):
    """A bare .arrow file, as `datasets` writes its shards."""

    def rows(self, columns: frozenset[str] | None = None) -> Iterator[RawRow]:
        import pyarrow as pa
        from datasets import Dataset

        try:
            dataset = Dataset.from_file(str(self.path))
        except (pa.ArrowException, OSError) as error:
            raise self.damaged(error) from None
        yield from _dataset_rows(dataset, columns, self.damaged)


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
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            for row in table.to_pylist():
                number += 1
                yield RawRow(number, row)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(error, number + 1) from None


def open_folder(folder: Path, *, split: str, subset: str | None) -> DatasetReader:
    """A folder that `datasets` saved, or one of plain files that it can load."""
    import datasets

    # Reading files that lie there needs no bar; a download from the hub keeps its own.
    showed_bars = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder), **_part(subset))
    except Exception as error:  # the library raises anything from OSError to its own builders' errors
        raise DataError(
            f"The data folder cannot be read: {_last_line(error)}",
            where=str(folder),
            hint="a folder saved with Dataset.save_to_disk, or one of jsonl, json, csv or parquet files",
        ) from error
    finally:
        if showed_bars:
            datasets.enable_progress_bars()
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
