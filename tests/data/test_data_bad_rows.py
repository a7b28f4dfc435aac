"""A malformed row is an error that names file, row and field, or is dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import OPENS_THOUGHTS, STRIPS_THOUGHTS, bpe

from dpo_cli.errors import DataError

GOOD = {"prompt": "Eggs?\n", "chosen": "Yes.", "rejected": "No."}
ASK = {"role": "user", "content": "Eggs?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
CHAT = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}
HH = {"chosen": "\n\nHuman: Eggs?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Eggs?\n\nAssistant: No."}
RANKED = {"prompt": "Eggs?\n", "responses": ["a", "b"], "scores": [1, 2]}
LABELLED = {"prompt": "Eggs?\n", "completion": "Yes.", "label": True}


def without(row: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != field}


# name: (a good row, the bad row after it or its raw bytes, the field named, words of the message, the reason counted)
BAD: dict[str, tuple[dict[str, Any], Any, str | None, str, str]] = {
    "bad JSON": (GOOD, b'{"prompt": "a", "chosen": ', None, "not valid JSON", "bad_json"),
    "a row that is a list": (GOOD, b'["a", "b"]', None, "should be an object", "wrong_type"),
    "a missing field": (GOOD, without(GOOD, "chosen"), "chosen", "'chosen' is missing", "missing_field"),
    "a null field": (GOOD, {**GOOD, "rejected": None}, "rejected", "'rejected' is null", "missing_field"),
    "a number for text": (
        GOOD,
        {**GOOD, "chosen": 5},
        "chosen",
        r"should be text, but is a number \(5\)",
        "wrong_type",
    ),
    "messages among texts": (GOOD, {**GOOD, "chosen": [YES]}, "chosen", "should be text, but is a list", "wrong_type"),
    "an empty response": (GOOD, {**GOOD, "rejected": " \n"}, "rejected", "'rejected' is empty", "empty"),
    "an empty prompt": (GOOD, {**GOOD, "prompt": ""}, "prompt", "'prompt' is empty", "empty"),
    "invalid UTF-8": (
        GOOD,
        b'{"prompt": "Eggs?", "chosen": "caf\xe9", "rejected": "No."}',
        "chosen",
        "'chosen' is not valid UTF-8 at character 4",
        "invalid_utf8",
    ),
    "half a surrogate pair": (
        GOOD,
        b'{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}',
        "chosen",
        "UTF-8",
        "invalid_utf8",
    ),
    "a message without content": (
        CHAT,
        {**CHAT, "chosen": [{"role": "assistant"}]},
        "chosen[0].content",
        "is missing",
        "missing_field",
    ),
    "a message without role": (
        CHAT,
        {**CHAT, "prompt": [{"content": "a"}]},
        "prompt[0].role",
        "is missing",
        "missing_field",
    ),
    "an unknown role": (
        CHAT,
        {**CHAT, "prompt": [{"role": "robot", "content": "a"}]},
        "prompt[0]",
        "'robot', not one",
        "wrong_type",
    ),
    "an empty message list": (CHAT, {**CHAT, "prompt": []}, "prompt", "'prompt' is empty", "empty"),
    "an empty reply": (CHAT, {**CHAT, "chosen": [{**YES, "content": ""}]}, "chosen", "'chosen' is empty", "empty"),
    "a response of several turns": (
        CHAT,
        {**CHAT, "chosen": [YES, ASK, YES]},
        "chosen",
        "answers with 3 messages",
        "many_turns",
    ),
    "a response of the user": (CHAT, {**CHAT, "chosen": [ASK]}, "chosen", "not the assistant", "wrong_type"),
    "a prompt that has its reply": (CHAT, {**CHAT, "prompt": [ASK, YES]}, "prompt", "has had its reply", "no_prompt"),
    "tools that are no JSON": (CHAT, {**CHAT, "tools": "[oops"}, "tools", "'tools' is not valid JSON", "bad_json"),
    "an image": (
        CHAT,
        {**CHAT, "prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "prompt[0].content",
        "only text",
        "wrong_type",
    ),
    "transcripts that share no turn": (
        HH,
        {"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: C\n\nAssistant: B"},
        "chosen",
        "no prompt",
        "no_prompt",
    ),
    "a transcript without a reply": (
        HH,
        {**HH, "chosen": "\n\nHuman: Eggs?\n\nAssistant:"},
        "chosen",
        "'chosen' is empty",
        "empty",
    ),
    "one ranked response": (RANKED, {**RANKED, "responses": ["a"]}, "responses", "at least 2", "too_few_responses"),
    "too few scores": (RANKED, {**RANKED, "scores": [1]}, "scores", "holds 1 for 2 responses", "wrong_type"),
    "a score that is no number": (
        RANKED,
        {**RANKED, "scores": [1, "x"]},
        "scores[1]",
        "should be a number",
        "wrong_type",
    ),
    "a label that is no verdict": (LABELLED, {**LABELLED, "label": "maybe"}, "label", "true or false", "wrong_type"),
    "half of the reference": (
        {**GOOD, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
        {**GOOD, "ref_chosen_logps": -1.0},
        "ref_rejected_logps",
        "is missing",
        "missing_field",
    ),
    "a log-prob above 0": (
        {**GOOD, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
        {**GOOD, "ref_chosen_logps": 3.0, "ref_rejected_logps": -2.0},
        "ref_chosen_logps",
        "never above 0",
        "reference",
    ),
    "a log-prob that is not finite": (
        {**GOOD, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0},
        {**GOOD, "ref_chosen_logps": float("nan"), "ref_rejected_logps": -2.0},
        "ref_chosen_logps",
        "finite",
        "wrong_type",
    ),
}


def _write(tmp_path: Path, good: dict[str, Any], bad: Any) -> str:
    path = tmp_path / "mine.jsonl"
    raw = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + raw + b"\n")
    return str(path)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_row_and_field(name: str, tmp_path: Path, prepare: Any) -> None:
    good, bad, field, words, _ = BAD[name]
    kind = "unpaired" if "label" in good else "pair"
    with pytest.raises(DataError, match=words) as caught:
        prepare(_write(tmp_path, good, bad), kind=kind)
    # The second row is on the third line, after a blank one.
    place = f"mine.jsonl row 3, field {field}" if field else "mine.jsonl row 3"
    assert caught.value.where is not None and caught.value.where.endswith(place)
    assert caught.value.hint is not None and "data.on_bad_row=drop" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", [name for name in BAD if "label" not in BAD[name][0]])
def test_a_bad_row_may_be_dropped_and_is_counted(name: str, tmp_path: Path, prepare: Any) -> None:
    good, bad, _, _, reason = BAD[name]
    prepared = prepare(_write(tmp_path, good, bad), on_bad_row="drop")
    assert len(prepared.train) == 1
    assert {why: (count.rows, count.first) for why, count in prepared.report.train.dropped.items()} == {
        reason: (1, ["mine.jsonl row 3"])
    }


def test_what_was_prepared_without_its_bad_rows_does_not_hide_them(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl([GOOD, {**GOOD, "chosen": ""}])
    assert len(prepare(path, on_bad_row="drop").train) == 1
    with pytest.raises(DataError, match="'chosen' is empty"):
        prepare(path, on_bad_row="error")
    assert prepare(path, on_bad_row="drop").report.from_cache


def test_a_mapped_column_is_named_as_the_user_knows_it(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl([{"q": "a", "good": "b", "bad": "c"}, {"q": "a", "good": "", "bad": "c"}])
    with pytest.raises(DataError, match="'chosen' is empty") as caught:
        prepare(path, columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert "row 2, field chosen (the column good)" in str(caught.value)


def test_the_first_bad_row_does_not_decide_the_format(prepare: Any, write_jsonl: Any) -> None:
    prepared = prepare(write_jsonl([{**GOOD, "rejected": 5}, GOOD]), on_bad_row="drop")
    assert prepared.report.train.sources[0].format == "prompt/chosen/rejected text"
    assert len(prepared.train) == 1


def test_only_the_first_five_rows_are_named(prepare: Any, write_jsonl: Any) -> None:
    prepared = prepare(write_jsonl([GOOD, *[{**GOOD, "chosen": ""}] * 9]), on_bad_row="drop")
    count = prepared.report.train.dropped["empty"]
    assert count.rows == 9
    assert count.first == [f"pairs.jsonl row {row}" for row in range(2, 7)]


@pytest.mark.parametrize(
    ("content", "words", "place"),
    [
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": oops}]', "not valid JSON", "row 2"),
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prom', "not valid JSON", "row 2"),
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"}', "the list is not closed", "row 2"),
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"} {}]', "a comma is missing", "row 2"),
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"}] x', "follows the end", "row 2"),
        (b'[{"prompt": "a", "chosen": "b", "rejected": "c"}, 7]', "should be an object", "row 2"),
    ],
)
def test_a_broken_json_list_is_named_by_row(
    content: bytes, words: str, place: str, tmp_path: Path, prepare: Any
) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        prepare(str(tmp_path / "mine.json"))
    assert place in str(caught.value.where)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt,chosen,rejected\na,b,c\na,b\n", "2 cells and the header 3"),
        (b"prompt,chosen,rejected\na,b,c\na,caf\xe9,c\n", "not valid UTF-8"),
        (b"prompt,chosen,rejected\na,b,c\na,,c\n", "'chosen' is empty"),
        (b'prompt,chosen,rejected\na,b,c\na,"b,c\n', "damaged"),
    ],
)
def test_a_broken_csv_row_is_named(content: bytes, words: str, tmp_path: Path, prepare: Any) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        prepare(str(tmp_path / "mine.csv"))
    assert "mine.csv row 2" in str(caught.value.where)


def test_an_empty_file_is_an_error(tmp_path: Path, prepare: Any) -> None:
    (tmp_path / "mine.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        prepare(str(tmp_path / "mine.jsonl"))


def test_when_nothing_is_left_the_reasons_are_given(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl([{**GOOD, "chosen": "No."}, {**GOOD, "prompt": "the " * 99}])
    with pytest.raises(DataError, match=r"Nothing is left of the 2 rows.*1 with identical.*1 longer than 20 tokens"):
        prepare(path, max_tokens=20)


def test_a_template_that_strips_thoughts_is_shown_with_both_texts(prepare: Any, write_jsonl: Any) -> None:
    row = {**CHAT, "chosen": [{"role": "assistant", "content": "<think>12?</think>Yes."}]}
    with pytest.raises(DataError, match="does not render all of the reply's words") as caught:
        prepare(write_jsonl([CHAT, row]), tokenizer=bpe(chat_template=STRIPS_THOUGHTS))
    assert "<think>12?</think>Yes." in str(caught.value) and "row 2" in str(caught.value)


def test_a_template_that_changes_the_prompt_is_refused_at_the_start(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="renders the prompt differently once a reply follows") as caught:
        prepare(write_jsonl([CHAT]), tokenizer=bpe(chat_template=OPENS_THOUGHTS))
    shown = str(caught.value)
    assert "prompt alone" in shown and "with the reply" in shown and "<think>" in shown


def test_chats_need_a_chat_template(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="no chat template"):
        prepare(write_jsonl([CHAT]), tokenizer=bpe(chat_template=None))
    with pytest.raises(DataError, match=r"data\.chat is false"):
        prepare(write_jsonl([CHAT]), chat=False)


def test_a_template_that_raises_names_the_row(prepare: Any, write_jsonl: Any) -> None:
    refuses_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer = bpe(chat_template=refuses_system + str(bpe().chat_template))
    row = {**CHAT, "prompt": [{"role": "system", "content": "Be brief."}, ASK]}
    with pytest.raises(DataError, match="cannot render it: no system here") as caught:
        prepare(write_jsonl([CHAT, row]), tokenizer=tokenizer)
    assert "pairs.jsonl row 2" in str(caught.value.where)


@pytest.mark.parametrize("template", ["no column", "{0}", "{question!r}", "{question", "{a.b}"])
def test_a_prompt_template_that_names_no_column_is_an_error(template: str, prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match=r"data\.prompt_template"):
        prepare(write_jsonl([GOOD]), prompt_template=template)


def test_token_weights_need_pairs(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="takes no pairs"):
        prepare(write_jsonl([GOOD]), kind="demonstration", token_weights=2.0)


def test_kto_needs_two_prompts(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="all rows have the same prompt"):
        prepare(write_jsonl([LABELLED, {**LABELLED, "completion": "No.", "label": False}]), kind="unpaired")
