"""Questions from files as people have them, and ids as training would see them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from dpo_cli.data.prepare import prepare_data
from dpo_cli.data.settings import DataSettings
from dpo_cli.errors import DataError
from dpo_cli.paths import resolve_path
from dpo_cli.policy.tokenizer import load_tokenizer, read_stop_token_ids
from dpo_cli.rollout.questions import Encoder, QuestionSettings, read_questions
from dpo_cli.rollout.verify import verifier_of

ROWS: list[dict[str, Any]] = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]
BASE = Path(resolve_path("dpo_cli://example/base"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_any_file_reads_to_the_same_questions(tmp_path: Path, ending: str) -> None:
    found = read_questions(write(tmp_path / f"q.{ending}", ROWS), QuestionSettings())
    assert [(q.number, q.prompt, q.truth) for q in found.questions] == [(0, "1+1?", "2"), (1, "2+2?", "4")]
    assert found.columns == {"prompt": "question", "truth": "answer"}


def test_columns_of_ones_own_templates_and_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"ask": "1+1?", "result": 2, "best": "two"}])
    columns = {"prompt": "ask", "truth": "result"}
    settings = QuestionSettings(columns=columns, prompt_template="Q: {ask}\\nA: ", chosen="best")
    (question,) = read_questions(path, settings).questions
    assert (question.prompt, question.truth, question.chosen) == ("Q: 1+1?\nA: ", "2", "two")


def test_messages_stay_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"prompt": [{"role": "user", "content": "1+1?"}], "truth": "2"}])
    (question,) = read_questions(path, QuestionSettings()).questions
    assert question.prompt == [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "", "answer": "2"}, ["row 2", "question", "empty"]),
        ({"question": 5, "answer": "2"}, ["row 2", "question", "text"]),
        ({"answer": "2"}, ["row 2", "'question' is missing"]),
        ({"question": "a"}, ["row 2", "'answer' is missing"]),
        ({"question": "a", "answer": True}, ["row 2", "answer", "true/false"]),
        ({"question": "a", "answer": "twelve"}, ["row 2", "twelve"]),
    ],
)
def test_a_bad_row_is_named_or_dropped_and_counted(tmp_path: Path, row: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path / "q.jsonl", [ROWS[0], row, ROWS[1]])
    with pytest.raises(DataError) as caught:
        read_questions(path, QuestionSettings(verifier=verifier_of("gsm8k")))
    assert all(word in str(caught.value) for word in [*words, "q.jsonl"])
    found = read_questions(path, QuestionSettings(verifier=verifier_of("gsm8k"), on_bad_row="drop"))
    # A dropped row moves no other one's random numbers.
    assert [question.number for question in found.questions] == [0, 2]
    assert found.dropped == ["q.jsonl row 2"]


def test_text_that_is_not_utf8_is_named_by_row_and_field(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"prompt": "fine", "answer": 1}\n{"prompt": "\xff", "answer": 5}\n')
    with pytest.raises(DataError, match=r"UTF-8[\s\S]*row 2, field prompt"):
        read_questions(str(tmp_path / "q.jsonl"), QuestionSettings())


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "truth": "1"}\n{"prompt": \n')
    with pytest.raises(DataError, match="row 2"):
        read_questions(str(tmp_path / "q.jsonl"), QuestionSettings())


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([{"ask": "a"}], QuestionSettings(), ["recognised", "ask", "columns.prompt"]),
        ([], QuestionSettings(), ["no prompts"]),
        (ROWS, QuestionSettings(columns={"promt": "question"}), ["promt"]),
        (ROWS, QuestionSettings(columns={"prompt": "querstion"}), ["querstion", "question"]),
        ([{"prompt": "a"}], QuestionSettings(verifier=verifier_of("exact")), ["truth", "columns.truth"]),
    ],
)
def test_unusable_files_are_explained(
    tmp_path: Path, rows: list[dict[str, Any]], settings: QuestionSettings, words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        read_questions(write(tmp_path / "q.jsonl", rows), settings)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("answer", [["a", "b"], None, {"label": "B"}, True, ""])
def test_what_is_compared_with_nothing_may_hold_anything(tmp_path: Path, answer: Any) -> None:
    path = write(tmp_path / "q.jsonl", [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": answer}])
    assert [question.truth for question in read_questions(path, QuestionSettings()).questions] == ["2", None]
    with pytest.raises(DataError, match="row 2"):
        read_questions(path, QuestionSettings(columns={"truth": "answer"}))


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    assert len(read_questions(write(tmp_path / "q.jsonl", ROWS), QuestionSettings(limit=1)).questions) == 1


def test_prompts_and_responses_have_the_ids_that_training_gives_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BASE)
    stops = read_stop_token_ids(BASE, tokenizer)
    file = Path(resolve_path("dpo_cli://example/pairs.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()[:40]]
    path = write(tmp_path / "pairs.jsonl", rows)
    data = prepare_data(
        DataSettings(train=path, workers=1), tokenizer, kind="pair", stop_token_ids=stops, seed=0, store_dir=tmp_path
    )
    encoder = Encoder(tokenizer, stops, chat=None, prompts=[row["prompt"] for row in rows])
    for number, row in enumerate(rows):
        example = data.train[number]
        prompt = encoder.prompt(row["prompt"])
        assert prompt.tolist() == example.prompt.tolist()
        assert encoder.texts(prompt, example.responses) == [row["chosen"], row["rejected"]]
        for text, ids in zip((row["chosen"], row["rejected"]), example.responses, strict=True):
            assert encoder.trains_as_sampled(row["prompt"], prompt, text, ids)
            # The same text in other tokens: a pair of digits that the tokenizer writes as one, or one cut short.
            assert not encoder.trains_as_sampled(row["prompt"], prompt, text, ids[:-1])


def test_the_same_text_in_other_tokens_is_told_apart() -> None:
    tokenizer = load_tokenizer(BASE)
    stops = read_stop_token_ids(BASE, tokenizer)
    encoder = Encoder(tokenizer, stops, chat=None, prompts=["Clara has 63 shells.\n"])
    prompt = encoder.prompt("Clara has 63 shells.\n")
    ids = tokenizer.encode(" shells", add_special_tokens=False)
    apart = [token for letter in " shells" for token in tokenizer.encode(letter, add_special_tokens=False)]
    assert len(apart) > len(ids)
    assert encoder.texts(prompt, [np.array(apart, np.int32)]) == [" shells"]
    end = [tokenizer.eos_token_id]
    assert encoder.trains_as_sampled("Clara has 63 shells.\n", prompt, " shells", np.array(ids + end, np.int32))
    assert not encoder.trains_as_sampled("Clara has 63 shells.\n", prompt, " shells", np.array(apart + end, np.int32))
