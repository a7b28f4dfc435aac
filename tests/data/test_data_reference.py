"""Reference log-probs that come with the data are taken as they are, or refused when they cannot be these tokens'."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import bpe

from dpo_cli.errors import DataError

PAIR = {"prompt": "Eggs?\n", "chosen": "Tom has twelve.", "rejected": "She sells."}


def _per_token(row: dict[str, str]) -> tuple[list[float], list[float], int]:
    """Made-up log-probs for each token of chosen and rejected (the end token included), and the prompt's length."""
    tokenizer = bpe()
    lengths = [len(tokenizer.encode(row[name])) + 1 for name in ("chosen", "rejected")]
    better, worse = ([-0.25 * (at + 1) for at in range(length)] for length in lengths)
    return better, worse, len(tokenizer.encode(row["prompt"]))


def _rlaifv(row: dict[str, str], *, with_prompt: bool) -> dict[str, Any]:
    better, worse, prompt_tokens = _per_token(row)
    columns: dict[str, Any] = {}
    for side, values in (("win", better), ("rej", worse)):
        columns[f"ref_{side}_logp"] = sum(values)
        columns[f"ref_{side}_avg_logp"] = sum(values) / len(values)
        before = [-7.0] * (prompt_tokens - 1) if with_prompt else []
        columns[f"ref_{side}_per_token_logp"] = before + values
    return columns


def test_our_sums_are_carried_along(prepare: Any, write_jsonl: Any) -> None:
    prepared = prepare(write_jsonl([{**PAIR, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0}]))
    reference = prepared.train[0].reference
    assert reference is not None
    assert [each.tolist() for each in reference] == [[-3.5], [-4.0]]
    assert prepared.report.train.reference


def test_our_columns_may_be_per_token(prepare: Any, write_jsonl: Any) -> None:
    better, worse, _ = _per_token(PAIR)
    reference = (
        prepare(write_jsonl([{**PAIR, "ref_chosen_logps": better, "ref_rejected_logps": worse}])).train[0].reference
    )
    assert [each.tolist() for each in reference] == [better, worse]


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("form", ["columns", "packed", "packed text", "packed in an object"])
def test_rlaifv_values_in_all_their_forms(form: str, with_prompt: bool, prepare: Any, write_jsonl: Any) -> None:
    columns = _rlaifv(PAIR, with_prompt=with_prompt)
    names = ["logp", "avg_logp", "per_token_logp"]
    packed = [columns[f"ref_{side}_{name}"] for side in ("win", "rej") for name in names]
    row = {**PAIR, "question": PAIR["prompt"], **(columns if form == "columns" else {})}
    del row["prompt"]
    if form != "columns":
        row["logps"] = {"packed": packed, "packed text": json.dumps(packed)}.get(form, {"logps": packed})
    better, worse, _ = _per_token(PAIR)
    prepared = prepare(write_jsonl([row]))
    assert prepared.report.train.sources[0].format == "question/chosen/rejected text"
    assert [each.tolist() for each in prepared.train[0].reference] == [better, worse]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ref_win_avg_logp": -0.5}, "are over .* tokens; here it has"),
        ({"ref_rej_per_token_logp": [-1.0, -2.0]}, "reference log-probs of 2 tokens; here it has"),
        ({"ref_win_logp": None}, "'ref_win_logp' is missing"),
        ({"ref_rej_logp": "many"}, "should be a number"),
        ({"ref_rej_per_token_logp": 5}, "should be a list"),
    ],
)
def test_values_of_other_tokens_are_refused(change: dict[str, Any], words: str, prepare: Any, write_jsonl: Any) -> None:
    row = {**PAIR, **_rlaifv(PAIR, with_prompt=False), **change}
    row = {name: value for name, value in row.items() if value is not None}
    with pytest.raises(DataError, match=words) as caught:
        prepare(write_jsonl([row]))
    assert "pairs.jsonl row 1" in str(caught.value.where)


def test_a_sum_that_its_tokens_do_not_give_is_refused(prepare: Any, write_jsonl: Any) -> None:
    columns = _rlaifv(PAIR, with_prompt=False)
    columns["ref_win_per_token_logp"] = [value * 1.1 for value in columns["ref_win_per_token_logp"]]
    with pytest.raises(DataError, match="per-token reference log-probs of 'chosen' sum to"):
        prepare(write_jsonl([{**PAIR, **columns}]))


def test_a_packed_list_has_six_items(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="list of six items, but is 2 items"):
        prepare(write_jsonl([{**PAIR, "logps": [-1.0, -2.0]}]))


def test_all_rows_bring_them_or_none(prepare: Any, write_jsonl: Any) -> None:
    with_them = {**PAIR, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0}
    with pytest.raises(DataError, match="Some rows bring reference log-probs and others do not") as caught:
        prepare(write_jsonl([PAIR, with_them, PAIR]))
    assert caught.value.where == "with: pairs.jsonl row 2; without: pairs.jsonl row 1"


def test_token_weights_need_them_per_token(prepare: Any, write_jsonl: Any) -> None:
    sums = {**PAIR, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0}
    with pytest.raises(DataError, match="needs per-token reference log-probs"):
        prepare(write_jsonl([sums]), token_weights=2.0)
    better, worse, _ = _per_token(PAIR)
    each = {**PAIR, "ref_chosen_logps": better, "ref_rejected_logps": worse}
    example = prepare(write_jsonl([each]), token_weights=2.0).train[0]
    assert len(example.weights[0]) == len(example.reference[0]) == len(example.responses[0])


def test_a_cut_row_cannot_keep_them(prepare: Any, write_jsonl: Any) -> None:
    row = {**PAIR, "chosen": "Tom has twelve. " * 20, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0}
    with pytest.raises(DataError, match="the row was cut"):
        prepare(write_jsonl([row]), max_tokens=30, on_long="truncate")


def test_losses_that_cannot_use_them_say_so(prepare: Any, write_jsonl: Any) -> None:
    rows = [{**PAIR, "prompt": p, "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0} for p in ("A?\n", "B?\n")]
    prepared = prepare(write_jsonl(rows), kind="unpaired")
    assert prepared.train[0].reference is None
    assert prepared.report.train.noticed["reference_unused"].rows == 4
    np.testing.assert_equal(prepared.report.train.reference, False)
