"""Every common shape of preference data becomes the same prompt and responses."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tokenizers import CHATML_WITH_TOOLS, bpe

from dpo_cli.errors import DataError

EOS = "<|endoftext|>"
CHAT_PROMPT = "<|im_start|>user\nHow many eggs?<|im_end|>\n<|im_start|>assistant\n"
CHAT_CHOSEN, CHAT_REJECTED = "Twelve.<|im_end|>", "Ten, I think.<|im_end|>"
ASK = {"role": "user", "content": "How many eggs?"}
GOOD, BAD = {"role": "assistant", "content": "Twelve."}, {"role": "assistant", "content": "Ten, I think."}
SHARE_ASK = {"from": "human", "value": "How many eggs?"}
SHARE_GOOD, SHARE_BAD = {"from": "gpt", "value": "Twelve."}, {"from": "gpt", "value": "Ten, I think."}


def test_plain_text_is_used_as_it_stands_with_one_end_token(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    prepared = prepare(write_jsonl([{"prompt": "How many?\n", "chosen": "Twelve.", "rejected": "Ten."}]))
    assert texts(prepared.train) == [("How many?\n", f"Twelve.{EOS}", f"Ten.{EOS}")]
    assert "prompt/chosen/rejected text; plain text, '<|endoftext|>' added" in prepared.report.lines()[0]


CHATS = {
    "message lists": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, "prompt/chosen/rejected messages"),
    "responses that repeat the prompt's messages": (
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "prompt/chosen/rejected messages",
    ),
    "ultrafeedback_binarized": (
        {"prompt": "How many eggs?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 8.0},
        "prompt/chosen/rejected messages",
    ),
    "implicit prompt": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 8.0},
        "chosen/rejected conversations, prompt implicit",
    ),
    "sharegpt": (
        {"conversations": [SHARE_ASK], "chosen": SHARE_GOOD, "rejected": SHARE_BAD},
        "ShareGPT conversations + chosen/rejected",
    ),
    "sharegpt with text responses": (
        {"conversations": [SHARE_ASK], "chosen": "Twelve.", "rejected": "Ten, I think."},
        "ShareGPT conversations + chosen/rejected",
    ),
    "keys that Arrow filled with null": (
        {
            "prompt": [{**ASK, "tool_calls": None}],
            "chosen": [{**GOOD, "name": None}],
            "rejected": [{**BAD, "name": None}],
        },
        "prompt/chosen/rejected messages",
    ),
    "content as a list of text parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "How many eggs?"}]}],
            "chosen": [GOOD],
            "rejected": [BAD],
        },
        "prompt/chosen/rejected messages",
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_messages_of_every_form_go_through_the_chat_template(
    name: str, prepare: Any, write_jsonl: Any, texts: Any
) -> None:
    row, format_name = CHATS[name]
    prepared = prepare(write_jsonl([row]))
    assert texts(prepared.train) == [(CHAT_PROMPT, CHAT_CHOSEN, CHAT_REJECTED)]
    assert f"{format_name}; chat template" in prepared.report.lines()[0]


def test_plain_text_becomes_a_chat_only_when_asked(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"prompt": "How many eggs?", "chosen": "Twelve.", "rejected": "Ten, I think."}])
    assert texts(prepare(path, chat=True).train) == [(CHAT_PROMPT, CHAT_CHOSEN, CHAT_REJECTED)]


def test_a_transcript_is_split_at_the_last_shared_assistant_turn(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    start = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Eggs?\n\nAssistant:"
    # Both answers begin with "I th": a shared beginning is not a boundary.
    path = write_jsonl([{"chosen": f"{start} I think twelve.", "rejected": f"{start} I thought ten."}])
    prepared = prepare(path)
    assert texts(prepared.train) == [(start, f" I think twelve.{EOS}", f" I thought ten.{EOS}")]
    chat = texts(prepare(path, chat=True).train)[0]
    assert chat[0] == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nEggs?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat[1] == "I think twelve.<|im_end|>"


def test_stack_exchange_questions_fill_the_template(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"question": "Why?", "response_j": "Tom has twelve.", "response_k": "She sells.", "date": "x"}])
    plain = texts(prepare(path).train)
    # The template ends in a space, which the tokenizer puts into the response's first token.
    assert plain == [("Question: Why?\n\nAnswer:", f" Tom has twelve.{EOS}", f" She sells.{EOS}")]
    other = prepare(path, prompt_template=r"Q {question}\n")
    assert texts(other.train) == [("Q Why?\n", f"Tom has twelve.{EOS}", f"She sells.{EOS}")]


def test_a_question_with_its_answer_is_a_demonstration(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"question": "Eggs?", "answer": " Twelve.", "level": 3}])
    assert texts(prepare(path, kind="demonstration").train) == [("Eggs?", f" Twelve.{EOS}")]
    other = prepare(path, kind="demonstration", prompt_template="Q {question} ({level}):")
    assert texts(other.train) == [("Q Eggs? (3):", f" Twelve.{EOS}")]


def test_a_template_may_use_any_column(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    rows = [{"topic": "eggs", "n": 3, "chosen": "Yes.", "rejected": "No."}]
    prepared = prepare(write_jsonl(rows), prompt_template="About {topic} ({n}):\n")
    assert texts(prepared.train) == [("About eggs (3):\n", f"Yes.{EOS}", f"No.{EOS}")]


def test_columns_are_mapped_by_name(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"q": "Eggs?\n", "better": "Yes.", "worse": "No.", "chosen": "decoy"}])
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    assert texts(prepare(path, columns=columns).train) == [("Eggs?\n", f"Yes.{EOS}", f"No.{EOS}")]


def test_system_and_tools_reach_the_chat_template(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    tokenizer = bpe(chat_template=CHATML_WITH_TOOLS)
    row = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "system": "Be brief.", "tools": '[{"name": "add"}]'}
    prompt = texts(prepare(write_jsonl([row]), tokenizer=tokenizer).train, tokenizer)[0][0]
    assert prompt.startswith(
        '<|im_start|>tools\n[{"name": "add"}]<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n'
    )
    plain = {
        "prompt": "Eggs?\n",
        "chosen": "Yes.",
        "rejected": "No.",
        "system": "Be brief.",
        "tools": [{"name": "add"}],
    }
    path = write_jsonl([plain], "plain.jsonl")
    assert set(prepare(path).report.train.noticed) == {"system_unused", "tools_unused"}
    chat = texts(prepare(path, chat=True, tokenizer=tokenizer).train, tokenizer)[0][0]
    assert chat.startswith('<|im_start|>tools\n[{"name": "add"}]<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n')


RANKED = {"prompt": "Rank:\n", "responses": ["bad", "best", "good", "fine"], "scores": [1, 9, 5, 5]}


def test_ranked_responses_become_pairs_without_ties(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([RANKED])
    assert [row[1:] for row in texts(prepare(path).train)] == [(f"best{EOS}", f"bad{EOS}")]
    every = {
        tuple(text.removesuffix(EOS) for text in row[1:]) for row in texts(prepare(path, ranked_pairs="all").train)
    }
    assert every == {("best", "good"), ("best", "fine"), ("best", "bad"), ("good", "bad"), ("fine", "bad")}


def test_a_ranked_list_keeps_one_response_of_every_rank(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    scored = prepare(write_jsonl([RANKED]), kind="ranked")
    assert texts(scored.train)[0][1:] == (f"best{EOS}", f"good{EOS}", f"bad{EOS}")
    listed = write_jsonl([{"prompt": "Rank:\n", "responses": ["a", "b", "c", "d"]}], "listed.jsonl")
    assert texts(prepare(listed, kind="ranked").train)[0][1:] == tuple(f"{name}{EOS}" for name in "abcd")


def test_a_row_of_ties_is_dropped_and_counted(prepare: Any, write_jsonl: Any) -> None:
    tied = {"prompt": "Rank:\n", "responses": ["a", "b"], "scores": [2.0, 2.0]}
    prepared = prepare(write_jsonl([RANKED, tied]))
    assert len(prepared.train) == 1
    assert prepared.report.train.dropped["tied"].first == ["pairs.jsonl row 2"]


def test_ranked_chats_are_rendered(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"prompt": [ASK], "responses": [[ASK, GOOD], [BAD]]}])
    assert texts(prepare(path, kind="ranked").train) == [(CHAT_PROMPT, CHAT_CHOSEN, CHAT_REJECTED)]


def test_a_pair_serves_every_kind_of_loss(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl(
        [{"prompt": "A?\n", "chosen": "yes", "rejected": "no"}, {"prompt": "B?\n", "chosen": "one", "rejected": "two"}]
    )
    assert texts(prepare(path, kind="ranked").train)[0] == ("A?\n", f"yes{EOS}", f"no{EOS}")
    assert texts(prepare(path, kind="demonstration").train)[0] == ("A?\n", f"yes{EOS}", f"no{EOS}")
    unpaired = prepare(path, kind="unpaired").train
    assert [(unpaired[at].desirable, row[1]) for at, row in enumerate(texts(unpaired))] == [
        (True, f"yes{EOS}"),
        (False, f"no{EOS}"),
        (True, f"one{EOS}"),
        (False, f"two{EOS}"),
    ]


def test_labelled_responses_borrow_the_next_other_prompts_response(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    rows = [("A?\n", "a1"), ("A?\n", "a2"), ("B?\n", "b1"), ("C?\n", "c1"), ("A?\n", "a3")]
    path = write_jsonl([{"prompt": p, "completion": c, "label": c != "a2"} for p, c in rows])
    train = prepare(path, kind="unpaired").train
    borrowed = [row[2].removesuffix(EOS) for row in texts(train)]
    # Cyclic: the last row's prompt is also the first's, so it goes on to the third row.
    assert borrowed == ["b1", "b1", "c1", "a3", "b1"]
    assert [train[at].desirable for at in range(5)] == [True, False, True, True, True]
    assert [train[at].packed_tokens for at in range(5)] == train.sizes.tolist()


def test_a_borrowed_response_is_cut_to_fit(prepare: Any, write_jsonl: Any) -> None:
    rows = [("A?\n", "one two three four five six seven"), ("the eggs of the fox " * 3, "yes")]
    path = write_jsonl([{"prompt": p, "completion": c, "label": True} for p, c in rows])
    limit = 30
    prepared = prepare(path, kind="unpaired", max_tokens=limit)
    assert len(prepared.train) == 2
    for at in range(2):
        example = prepared.train[at]
        assert len(example.prompt) + max(map(len, example.responses)) <= limit
        assert example.packed_tokens == prepared.train.sizes[at]
    assert prepared.report.borrowed_cut == 1


def test_desirable_responses_are_demonstrations(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl(
        [{"prompt": "A?\n", "completion": "yes", "label": 1}, {"prompt": "B?\n", "completion": "no", "label": 0}]
    )
    prepared = prepare(path, kind="demonstration")
    assert texts(prepared.train) == [("A?\n", f"yes{EOS}")]
    assert prepared.report.train.dropped["undesirable"].rows == 1


@pytest.mark.parametrize("row", [{"messages": [ASK, GOOD]}, {"conversations": [SHARE_ASK, SHARE_GOOD]}])
def test_conversations_are_demonstrations(row: dict[str, Any], prepare: Any, write_jsonl: Any, texts: Any) -> None:
    assert texts(prepare(write_jsonl([row]), kind="demonstration").train) == [(CHAT_PROMPT, CHAT_CHOSEN)]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "A?", "completion": "yes", "label": True}, "pair"),
        ({"prompt": "A?", "completion": "yes", "label": True}, "ranked"),
        ({"prompt": "A?", "completion": "yes"}, "pair"),
        ({"prompt": "A?", "completion": "yes"}, "unpaired"),
    ],
)
def test_data_that_cannot_serve_a_loss_is_refused(
    row: dict[str, Any], kind: str, prepare: Any, write_jsonl: Any
) -> None:
    with pytest.raises(DataError, match=r"The loss needs .*, and these rows are prompt/completion"):
        prepare(write_jsonl([row]), kind=kind)


def test_unknown_columns_are_named(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="columns instruction, good, bad") as caught:
        prepare(write_jsonl([{"instruction": "a", "good": "b", "bad": "c"}]))
    assert "data.columns.prompt=" in str(caught.value)


def test_a_misspelt_mapping_is_corrected(prepare: Any, write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="did you mean rejected"):
        prepare(write_jsonl([{"a": "b"}]), columns={"rejectd": "a"})
