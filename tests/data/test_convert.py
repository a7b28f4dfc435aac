"""What dpo-data convert writes teaches the same as what it read: the same tokens, in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from dpo_cli.data.convert import convert
from dpo_cli.data.settings import DataSettings
from dpo_cli.errors import DataError

ASK = {"role": "user", "content": "How many eggs?"}
GOOD, BAD = {"role": "assistant", "content": "Twelve."}, {"role": "assistant", "content": "Ten, I think."}
DIALOGUE = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Eggs?\n\nAssistant:"
TRANSCRIPT = {"chosen": f"{DIALOGUE} I think twelve.", "rejected": f"{DIALOGUE} I thought ten."}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("pair", {"prompt": "Eggs?\n", "chosen": "Twelve.", "rejected": "Ten."}),
    "text with a system message": (
        "pair",
        {"prompt": "Eggs?\n", "chosen": "Twelve.", "rejected": "Ten.", "system": "Count."},
    ),
    "messages": ("pair", {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "tools": '[{"name": "add"}]'}),
    "conversations": ("pair", {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}),
    "sharegpt": ("pair", {"conversations": [{"from": "human", "value": "Eggs?"}], "chosen": "Yes.", "rejected": "No."}),
    "transcript": ("pair", TRANSCRIPT),
    "stack exchange": ("pair", {"question": "Eggs?", "response_j": "Twelve.", "response_k": "Ten."}),
    "reference": (
        "pair",
        {"prompt": "Eggs?\n", "chosen": "a", "rejected": "b", "ref_chosen_logps": -1.5, "ref_rejected_logps": [-1, -2]},
    ),
    "ranked": ("ranked", {"prompt": "Eggs?\n", "responses": ["Ten.", "Twelve.", "12."], "scores": [1, 2, 2]}),
    "ranked messages": ("ranked", {"prompt": [ASK], "responses": [[GOOD], [BAD]]}),
    "verdict": ("unpaired", {"prompt": "Eggs?\n", "completion": "Twelve.", "label": True}),
    "completion": ("demonstration", {"prompt": [ASK], "completion": [GOOD]}),
    "question and answer": ("demonstration", {"question": "Eggs?\n", "answer": "Twelve."}),
    "one conversation": ("demonstration", {"messages": [ASK, GOOD]}),
}


def other(row: dict[str, Any]) -> dict[str, Any]:
    """The same row asking something else: KTO needs two prompts."""
    return json.loads(json.dumps(row).replace("ggs?", "ggs today?"))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_the_same_tokens_come_of_it(name: str, form: str, prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    kind, row = ROWS[name]
    source = write_jsonl([row, other(row)])
    out = tmp_path / f"out.{form}"
    assert convert(DataSettings(source), out).rows == 2
    assert prepare(str(out), kind=kind).digest == prepare(source, kind=kind).digest
    again = tmp_path / f"again.{form}"
    convert(DataSettings(str(out)), again)
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("name", ["text", "text with a system message", "transcript", "verdict", "ranked"])
def test_text_becomes_messages_when_asked(name: str, prepare: Any, write_jsonl: Any, tmp_path: Path) -> None:
    kind, row = ROWS[name]
    source, out = write_jsonl([row, other(row)]), tmp_path / "out.jsonl"
    convert(DataSettings(source, chat=True), out)
    assert isinstance(json.loads(out.read_text().splitlines()[0])["prompt"], list)
    assert prepare(str(out), kind=kind).digest == prepare(source, kind=kind, chat=True).digest


def test_columns_and_template_are_written_out(write_jsonl: Any, tmp_path: Path) -> None:
    source = write_jsonl([{"q": "Eggs", "good": "Twelve.", "bad": "Ten."}])
    columns = {"chosen": "good", "rejected": "bad"}
    convert(DataSettings(source, columns=columns, prompt_template=r"Q: {q}?\n"), tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "prompt": "Q: Eggs?\n",
        "chosen": "Twelve.",
        "rejected": "Ten.",
    }


def test_messages_are_a_plain_table(write_jsonl: Any, tmp_path: Path) -> None:
    convert(DataSettings(write_jsonl([ROWS["messages"][1]])), tmp_path / "out.parquet")
    row = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "tools": '[{"name": "add"}]'}
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == [row]


def test_bad_rows_are_refused_or_counted_and_nothing_half_is_left(write_jsonl: Any, tmp_path: Path) -> None:
    good = ROWS["text"][1]
    source, out = write_jsonl([good, {**good, "chosen": ""}, good]), tmp_path / "new" / "out.parquet"
    with pytest.raises(DataError, match="'chosen' is empty") as caught:
        convert(DataSettings(source), out)
    assert caught.value.where is not None and caught.value.where.endswith("row 2, field chosen")
    assert not list(out.parent.iterdir())
    done = convert(DataSettings(source, on_bad_row="drop"), out)
    assert (done.rows, done.dropped["empty"].first) == (2, ["pairs.jsonl row 2"])
    assert "dropped 1 with an empty prompt or response (first: pairs.jsonl row 2)" in "\n".join(done.lines())


def test_what_one_file_cannot_hold_is_refused(write_jsonl: Any, tmp_path: Path) -> None:
    text, chat = write_jsonl([ROWS["text"][1]], "a.jsonl"), write_jsonl([ROWS["messages"][1]], "b.jsonl")
    shown = write_jsonl([ROWS["completion"][1]], "c.jsonl")
    with pytest.raises(DataError, match="Some rows are text and others are messages"):
        convert(DataSettings([text, chat]), tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="One file cannot hold rows of"):
        convert(DataSettings([chat, shown]), tmp_path / "out.jsonl")
    assert convert(DataSettings([text, chat], chat=True), tmp_path / "out.jsonl").rows == 2


def test_a_table_refuses_what_it_would_lose(write_jsonl: Any, tmp_path: Path) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    row = {"prompt": [ASK], "chosen": [called], "rejected": [BAD]}
    with pytest.raises(DataError, match="no place for tool_calls"):
        convert(DataSettings(write_jsonl([row])), tmp_path / "out.parquet")
    assert convert(DataSettings(write_jsonl([row])), tmp_path / "out.jsonl").rows == 1
