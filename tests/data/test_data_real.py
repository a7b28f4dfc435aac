"""Real data with a real tokenizer: GSM8K's model solutions, and LLaMA-Factory's demonstration pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.data.prepare import prepare_data
from dpo_cli.data.settings import DataSettings


@pytest.fixture(scope="module")
def qwen2(real_data: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_data / "qwen2-tokenizer")


@pytest.fixture
def gsm8k_rows(real_data: Path) -> list[dict[str, str]]:
    rows = []
    for line in (real_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        tried = [value for value in problem.values() if isinstance(value, dict)]
        wrong = next((each["solution"] for each in tried if not each["is_correct"]), None)
        if wrong is not None:
            rows.append({"question": problem["question"], "chosen": problem["ground_truth"], "rejected": wrong})
    return rows


STOPS = frozenset({151645, 151643})  # <|im_end|>, <|endoftext|>
TEMPLATE = r"Question: {question}\n\nAnswer: "


def test_gsm8k_pairs_are_the_plain_tokenisation_of_their_text(
    gsm8k_rows: list[dict[str, str]], qwen2: Any, write_jsonl: Any, tmp_path: Path
) -> None:
    path = write_jsonl(gsm8k_rows)
    prepared = prepare_data(
        DataSettings(path, prompt_template=TEMPLATE, max_tokens=2048),
        qwen2,
        kind="pair",
        stop_token_ids=STOPS,
        seed=0,
        store_dir=tmp_path,
    )
    dropped = {reason: count.rows for reason, count in prepared.report.train.dropped.items()}
    assert len(prepared.train) + sum(dropped.values()) == len(gsm8k_rows)
    assert set(dropped) <= {"identical"}
    # A template that ends in a space: Qwen2 puts the space into the reply's first token, unless it starts with a digit.
    assert prepared.report.train.noticed["boundary_shifted"].rows > 0.9 * len(prepared.train)
    for at in range(0, len(prepared.train), 25):
        example = prepared.train[at]
        row = gsm8k_rows[int(example.origin.rsplit(" ", 1)[1]) - 1]
        prompt = f"Question: {row['question']}\n\nAnswer: "
        for ids, name in zip(example.responses, ("chosen", "rejected"), strict=True):
            whole = example.prompt.tolist() + ids.tolist()
            assert whole == [*qwen2.encode(prompt + row[name]), qwen2.eos_token_id]


def test_the_demonstration_pairs_are_the_chat_template_up_to_the_end_of_turn(
    real_data: Path, qwen2: Any, tmp_path: Path
) -> None:
    path = real_data / "preferences" / "dpo_en_demo.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    prepared = prepare_data(
        DataSettings(str(path), max_tokens=4096), qwen2, kind="pair", stop_token_ids=STOPS, seed=0, store_dir=tmp_path
    )
    source = prepared.report.train.sources[0]
    assert (source.format, source.rendering) == ("ShareGPT conversations + chosen/rejected", "chat template")
    assert len(prepared.train) + sum(count.rows for count in prepared.report.train.dropped.values()) == len(rows) == 300
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for at in range(0, len(prepared.train), 20):
        example = prepared.train[at]
        row = rows[int(example.origin.rsplit(" ", 1)[1]) - 1]
        for ids, reply in zip(example.responses, (row["chosen"], row["rejected"]), strict=True):
            chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in [*row["conversations"], reply]]
            rendered = qwen2.apply_chat_template(chat, tokenize=False).removesuffix("\n")
            assert qwen2.decode(example.prompt.tolist() + ids.tolist()) == rendered
            assert ids[-1] == 151645 and 151645 not in ids[:-1]
        assert qwen2.decode(example.prompt.tolist()).endswith("<|im_start|>assistant\n")
