"""The same rows from every kind of file, folder and list; weights and splits that only the seed decides."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from dpo_cli.data import json_reader
from dpo_cli.data.fields import decode_json_row
from dpo_cli.data.json_reader import JsonReader
from dpo_cli.errors import DataError

ROWS = [{"prompt": f"How many, {at}?\n", "chosen": f"{at} eggs", "rejected": f"no {at}"} for at in range(600)]


def _write(kind: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind}"
    if kind in ("jsonl", "json"):
        text = "\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows, indent=1)
        path.write_text(text, encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "saved dict":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    elif kind == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        path = next((folder / "saved").glob("*.arrow"))
    elif kind == "folder of files":
        path.mkdir()
        (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


KINDS = ["jsonl", "json", "jsonl.gz", "csv", "tsv", "parquet", "saved", "saved dict", "arrow", "folder of files"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_examples(kind: str, tmp_path: Path, prepare: Any, write_jsonl: Any) -> None:
    expected = prepare(write_jsonl(ROWS))
    found = prepare(_write(kind, tmp_path, ROWS))
    assert found.digest == expected.digest
    assert found.train[599].origin.endswith(" row 600")


def test_json_lines_may_end_in_json(tmp_path: Path, prepare: Any, write_jsonl: Any) -> None:
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert prepare(str(tmp_path / "lines.json")).digest == prepare(write_jsonl(ROWS)).digest


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64])
def test_a_json_list_is_read_in_pieces_of_any_size(at_once: int, tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{"prompt": 'a "quoted"\n\u00e9\U0001f600]', "n": [1.5, {"x": [None, True]}]}, {"prompt": "\\", "n": []}] * 3
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, ensure_ascii=False, indent=3) + "\n"):
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(json_reader, "_READ_BYTES", at_once)
        assert [row.content for row in JsonReader(path).rows()] == rows


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    read = list(JsonReader(path).rows())
    assert [(row.number, decode_json_row(row.content)) for row in read] == [(1, {"a": 1}), (3, {"a": 2})]  # type: ignore[arg-type]


def test_messages_survive_parquet(tmp_path: Path, prepare: Any, write_jsonl: Any) -> None:
    row = {
        "chosen": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "b"}],
        "rejected": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "c"}],
    }
    assert prepare(_write("parquet", tmp_path, [row])).digest == prepare(write_jsonl([row])).digest


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 600), (2.0, 1200), (0.5, 300), (2.5, 1500)])
def test_a_weight_is_how_often_an_epoch_takes_each_row(
    weight: float, expected: int, prepare: Any, write_jsonl: Any
) -> None:
    prepared = prepare([{"path": write_jsonl(ROWS), "weight": weight}])
    # Six standard deviations of a fair draw; whole weights are exact.
    assert abs(len(prepared.train) - expected) <= (0 if weight == int(weight) else 75)
    assert prepared.report.train.duplicates == 0
    seen = {prepared.train[at].origin for at in range(len(prepared.train))}
    assert len(seen) == (600 if weight >= 1 else len(prepared.train))


def test_a_fractional_weight_takes_the_same_rows_every_time(prepare: Any, write_jsonl: Any) -> None:
    source = [{"path": write_jsonl(ROWS), "weight": 0.5}]
    first = prepare(source, max_tokens=100)
    again = prepare(source, max_tokens=101)  # another cache entry, the same rows
    assert [first.train[at].origin for at in range(9)] == [again.train[at].origin for at in range(9)]
    other = prepare(source, seed=1)
    assert {first.train[at].origin for at in range(50)} != {other.train[at].origin for at in range(50)}


def test_sources_of_different_formats_are_joined(prepare: Any, write_jsonl: Any) -> None:
    one = write_jsonl(ROWS[:3], "one.jsonl")
    two = write_jsonl(
        [{"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: c"}], "two.jsonl"
    )
    prepared = prepare([one, {"path": two, "weight": 2.0, "name": "dialogues"}])
    assert len(prepared.train) == 5
    assert [source.name for source in prepared.report.train.sources] == ["one.jsonl", "dialogues"]
    assert prepared.train[4].origin == "dialogues row 1"


def test_files_that_share_a_name_are_told_apart(tmp_path: Path, prepare: Any, write_jsonl: Any) -> None:
    (tmp_path / "more").mkdir()
    paths = [write_jsonl(ROWS[:2]), write_jsonl(ROWS[2:4], "more/pairs.jsonl")]
    prepared = prepare(paths)
    assert [prepared.train[at].origin for at in (0, 2)] == [f"{path} row 1" for path in paths]


def test_a_pattern_names_files_in_order(tmp_path: Path, prepare: Any, write_jsonl: Any) -> None:
    write_jsonl(ROWS[:2], "part-1.jsonl")
    write_jsonl(ROWS[2:4], "part-2.jsonl")
    prepared = prepare(str(tmp_path / "part-*.jsonl"))
    assert [prepared.train[at].origin for at in (0, 2)] == ["part-1.jsonl row 1", "part-2.jsonl row 1"]


def test_a_split_of_a_saved_folder_evaluates(tmp_path: Path, prepare: Any) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS[:5]), "test": datasets.Dataset.from_list(ROWS[4:7])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    prepared = prepare(str(tmp_path / "both"), eval_split="test", eval_fraction=0.5)
    assert (len(prepared.train), len(prepared.eval)) == (5, 3)
    assert prepared.report.overlap == 1
    assert any("1 eval prompts are training prompts too" in line for line in prepared.report.lines())
    with pytest.raises(DataError, match="no split 'dev'") as caught:
        prepare(str(tmp_path / "both"), split="dev")
    assert "train, test" in str(caught.value)


def test_an_eval_split_means_nothing_for_a_plain_file(prepare: Any, write_jsonl: Any) -> None:
    assert prepare(write_jsonl(ROWS[:5]), eval_split="test").eval is None


def test_a_prompt_is_held_out_whole_or_not_at_all(prepare: Any, write_jsonl: Any) -> None:
    rows = [{**row, "prompt": ROWS[at // 4]["prompt"]} for at, row in enumerate(ROWS)]
    prepared = prepare(write_jsonl(rows), eval_fraction=0.3)
    sides = [
        {tuple(examples[at].prompt.tolist()) for at in range(len(examples))}
        for examples in (prepared.train, prepared.eval)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 150
    assert 0.1 < len(sides[1]) / 150 < 0.5  # five standard deviations around 0.3
    assert prepared.report.overlap == 0
    same = prepare(write_jsonl(rows), eval_fraction=0.3, max_tokens=77)
    assert {tuple(same.eval[at].prompt.tolist()) for at in range(len(same.eval))} == sides[1]


def test_repeated_rows_are_counted(prepare: Any, write_jsonl: Any) -> None:
    assert prepare(write_jsonl([*ROWS[:4], *ROWS[:2]])).report.train.duplicates == 2


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_repeated_rows_of_two_sources_are_counted_once_each(weight: float, prepare: Any, write_jsonl: Any) -> None:
    first, second = write_jsonl([*ROWS[:4], *ROWS[:2]], "first.jsonl"), write_jsonl(ROWS[:3], "second.jsonl")
    pairs = prepare([{"path": first, "weight": weight}, second])
    assert pairs.report.train.duplicates == 5
    # Each side of a pair is an example.
    assert prepare([{"path": first, "weight": weight}, second], kind="unpaired").report.train.duplicates == 10


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing.jsonl", "does not exist"),
        ("missing/*.jsonl", "No file matches"),
        ("rows.txt", "not known by its ending"),
        ("", "has no path"),
        ([], "No data is named"),
        ({"path": "rows.txt", "weight": -1.0}, "weight"),
    ],
)
def test_sources_that_cannot_be_read_are_errors(
    path: Any, words: str, tmp_path: Path, prepare: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match=words):
        prepare(path)


def test_a_misspelt_file_gets_a_suggestion(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl(ROWS[:2], "heldout.jsonl")
    with pytest.raises(DataError, match=r"did you mean .*heldout\.jsonl"):
        prepare(path.replace("heldout", "heldot"))


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl.gz"])
def test_a_damaged_file_is_an_error(ending: str, tmp_path: Path, prepare: Any) -> None:
    path = Path(_write(ending, tmp_path, ROWS))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged") as caught:
        prepare(str(path))
    assert path.name in str(caught.value.where)


def test_a_hub_name_without_a_network_says_so(prepare: Any) -> None:
    with pytest.raises(DataError, match="cannot be had from the Hugging Face hub") as caught:
        prepare("no-such-user/no-such-pairs")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert caught.value.where == "no-such-user/no-such-pairs[train]"


def test_files_inside_the_package_have_names_of_their_own(prepare: Any) -> None:
    with pytest.raises(DataError, match=r"dpo_cli/example/no_such\.jsonl does not exist"):
        prepare("dpo_cli://example/no_such.jsonl")
