"""Where a response begins and ends, for any text: against the plain tokenisation of prompt + response."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chat_tokenizers import EMPTY_THOUGHT, NO_END_OF_TURN, bpe, stops
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpo_cli.data.render import probe_template
from dpo_cli.data.rows import BadRow
from dpo_cli.data.token_weights import difference_weights
from dpo_cli.data.tokenise import EndOfReply, Tokens, TooLong, assemble, encode, fit, leading_special_ids
from dpo_cli.errors import DataError

TOKENIZER = bpe()
EOS = TOKENIZER.eos_token_id
PLAIN = EndOfReply(stops(TOKENIZER), append=EOS)
# Letters and spaces of the training text make merges across the prompt's end common; anything else comes now and then.
WORDS = st.text(st.sampled_from("the eggsTom.\n :A") | st.characters(codec="utf-8"), min_size=1, max_size=40)
IDS = st.lists(st.integers(10, 99), min_size=1, max_size=40)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_prompt_and_response_together_are_the_plain_tokenisation(prompt: str, responses: list[str]) -> None:
    whole = encode(TOKENIZER, [prompt + response for response in responses])
    alone = encode(TOKENIZER, [prompt])[0]
    try:
        tokens = assemble(alone, whole, leading=[], end=PLAIN)
    except BadRow:
        assume(False)
        return
    for ids, response in zip(whole, tokens.responses, strict=True):
        assert tokens.prompt + response == [*ids, EOS]
        assert sum(token in PLAIN.stops for token in response) == 1
    assert tokens.prompt == alone[: len(tokens.prompt)]
    assert ("boundary_shifted" in tokens.notes) == (len(tokens.prompt) < len(alone))


@given(IDS, st.lists(IDS, min_size=1, max_size=4), st.integers(2, 60), st.booleans())
def test_a_cut_keeps_the_prompts_end_and_a_token_of_every_response(
    prompt: list[int], responses: list[list[int]], limit: int, plain: bool
) -> None:
    tokens = Tokens(prompt, tuple([*ids, EOS] for ids in responses))
    try:
        fitted = fit(tokens, limit, prompt_can_be_cut=plain, leading=[])
    except TooLong:
        assert not plain and len(prompt) >= limit
        return
    assert len(fitted.prompt) + max(map(len, fitted.responses)) <= limit
    assert len(fitted.prompt) >= 1 and all(len(ids) >= 1 for ids in fitted.responses)
    assert prompt[len(prompt) - len(fitted.prompt) :] == fitted.prompt
    assert fitted.left_cut == (len(fitted.prompt) < len(prompt))
    for ids, kept in zip(tokens.responses, fitted.responses, strict=True):
        assert ids[: len(kept)] == kept
        # The end token is there exactly when nothing was cut off.
        assert (EOS in kept) == (len(kept) == len(ids))
    if len(prompt) < limit:
        assert fitted.prompt == prompt


def test_a_prompt_cut_from_its_left_keeps_its_bos() -> None:
    fitted = fit(Tokens([1, *range(10, 40)], ([50, 51],)), 12, prompt_can_be_cut=True, leading=[1])
    assert fitted.prompt == [1, *range(31, 40)]
    assert fitted.responses == ([50, 51],)


@given(WORDS)
def test_one_bos_whether_or_not_the_text_brings_it(text: str) -> None:
    tokenizer = bpe(adds_bos=True)
    leading = leading_special_ids(tokenizer)
    assert leading == [tokenizer.bos_token_id]
    for prompt in (text, f"<s>{text}"):
        alone, whole = encode(tokenizer, [prompt, f"{prompt} eggs"])
        tokens = assemble(alone, [whole], leading=leading, end=PLAIN)
        assert tokens.prompt[0] == tokenizer.bos_token_id
        assert tokens.prompt.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_bos_adds_nothing() -> None:
    assert leading_special_ids(TOKENIZER) == []


def test_a_response_that_brings_its_own_end_token_has_it_once() -> None:
    alone, whole = encode(TOKENIZER, ["Eggs?\n", "Eggs?\nYes.<|endoftext|>"])
    tokens = assemble(alone, [whole], leading=[], end=PLAIN)
    assert TOKENIZER.decode(tokens.responses[0]) == "Yes.<|endoftext|>"


@pytest.mark.parametrize(
    ("response", "expected", "noted"),
    [
        ("Yes.<|im_end|>\n", "Yes.<|im_end|>", False),
        ("Yes.<|im_end|><|im_end|>\n", "Yes.<|im_end|>", False),
        ("Yes.<|endoftext|>", "Yes.<|endoftext|>", False),
        ("Yes.<|im_end|> And more.<|im_end|>\n", "Yes.<|im_end|>", True),
    ],
)
def test_nothing_after_the_first_stop_token_is_scored(response: str, expected: str, noted: bool) -> None:
    (newline,) = encode(TOKENIZER, ["\n"])
    end = EndOfReply(stops(TOKENIZER), append=None, template_tail=tuple(newline))
    alone, whole = encode(TOKENIZER, ["Eggs?\n", f"Eggs?\n{response}"])
    tokens = assemble(alone, [whole], leading=[], end=end)
    assert TOKENIZER.decode(tokens.responses[0]) == expected
    assert ("text_after_stop" in tokens.notes) == noted


def test_a_response_that_is_only_an_end_token_is_refused() -> None:
    alone, whole = encode(TOKENIZER, ["Eggs?\n", "Eggs?\n<|im_end|>"])
    with pytest.raises(BadRow, match="no tokens of its own"):
        assemble(alone, [whole], leading=[], end=PLAIN)


def test_the_probe_finds_where_a_template_ends_a_reply() -> None:
    traits = probe_template(TOKENIZER, stops(TOKENIZER))
    assert traits.ends_reply and TOKENIZER.decode(list(traits.tail)) == "\n"
    assert not probe_template(bpe(chat_template=NO_END_OF_TURN), stops(TOKENIZER)).ends_reply


def test_a_template_without_an_end_of_turn_gets_the_end_token(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"prompt": "Eggs?", "chosen": "Yes.", "rejected": "No."}])
    prepared = prepare(path, chat=True, tokenizer=bpe(chat_template=NO_END_OF_TURN))
    # The boundary is shifted by the template's last space, which belongs to the reply's first token or is one itself.
    prompt, chosen, rejected = texts(prepared.train)[0]
    assert prompt + chosen == "[user] Eggs?\n[assistant] Yes.<|endoftext|>"
    assert prompt + rejected == "[user] Eggs?\n[assistant] No.<|endoftext|>"
    assert prepared.report.train.noticed["template_without_stop"].rows == 1


def test_what_a_template_puts_before_a_reply_is_scored_and_shown(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    tokenizer = bpe(chat_template=EMPTY_THOUGHT)
    prepared = prepare(write_jsonl([{"prompt": "A?", "chosen": "b", "rejected": "c"}]), chat=True, tokenizer=tokenizer)
    thought = "<think>\n\n</think>\n\n"
    prompt = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(prepared.train) == [(prompt, f"{thought}b<|im_end|>", f"{thought}c<|im_end|>")]
    assert any("before a reply, and it is scored with it" in line for line in prepared.report.lines())


def test_a_template_with_two_bos_is_refused(prepare: Any, write_jsonl: Any) -> None:
    tokenizer = bpe(adds_bos=True, chat_template="<s><s>" + NO_END_OF_TURN)
    with pytest.raises(DataError, match="'<s>' twice"):
        prepare(write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}]), chat=True, tokenizer=tokenizer)


def test_chat_templates_get_no_second_bos(prepare: Any, write_jsonl: Any) -> None:
    tokenizer = bpe(adds_bos=True, chat_template="<s>" + NO_END_OF_TURN)
    path = write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for chat in (True, False):
        prompt = prepare(path, chat=chat, tokenizer=tokenizer).train[0].prompt.tolist()
        assert prompt[0] == tokenizer.bos_token_id and prompt.count(tokenizer.bos_token_id) == 1


LONG = {
    "prompt": "How many eggs does Tom have?\n",
    "chosen": "Tom has twelve eggs. " * 9,
    "rejected": "She sells. " * 9,
}


def test_long_examples_are_dropped_cut_or_refused_as_told(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"prompt": "A?\n", "chosen": "b", "rejected": "c"}, LONG])
    assert prepare(path, max_tokens=30).report.train.dropped["too_long"].first == ["pairs.jsonl row 2"]
    cut = prepare(path, max_tokens=30, on_long="truncate")
    prompt, chosen, rejected = texts(cut.train)[1]
    assert prompt == LONG["prompt"]
    assert LONG["chosen"].startswith(chosen) and LONG["rejected"].startswith(rejected)
    assert cut.report.train.cut["response_cut"].rows == 1
    with pytest.raises(DataError, match=r"more than data\.max_tokens=30") as caught:
        prepare(path, max_tokens=30, on_long="error", on_bad_row="drop")
    assert "pairs.jsonl row 2" in str(caught.value.where)


def test_a_chat_is_never_cut_in_its_prompt(prepare: Any, write_jsonl: Any, texts: Any) -> None:
    path = write_jsonl([{"prompt": "A?", "chosen": "b", "rejected": "c"}, {**LONG, "prompt": "eggs " * 60 + "\n"}])
    chat = prepare(path, chat=True, max_tokens=50, on_long="truncate")
    assert chat.report.train.dropped["prompt_too_long"].rows == 1
    plain = prepare(path, max_tokens=50, on_long="truncate")
    assert plain.report.train.cut["prompt_cut"].rows == 1
    assert ("eggs " * 60 + "\n").endswith(texts(plain.train)[1][0])


def test_pairs_that_a_cut_makes_identical_are_dropped(prepare: Any, write_jsonl: Any) -> None:
    same = "Tom has twelve eggs. " * 5
    rows = [
        {"prompt": "A?\n", "chosen": "b", "rejected": "c"},
        {"prompt": "A?\n", "chosen": same + "one", "rejected": same + "two"},
        {"prompt": "A?\n", "chosen": "b", "rejected": "b"},
    ]
    dropped = prepare(write_jsonl(rows), max_tokens=20, on_long="truncate").report.train.dropped
    assert {reason: count.first for reason, count in dropped.items()} == {
        "identical_after_cut": ["pairs.jsonl row 2"],
        "identical": ["pairs.jsonl row 3"],
    }


def _matched(one: list[int], other: list[int]) -> int:
    """Length of the longest common block, by the definition."""
    best = 0
    for i in range(len(one)):
        for j in range(len(other)):
            size = 0
            while i + size < len(one) and j + size < len(other) and one[i + size] == other[j + size]:
                size += 1
            best = max(best, size)
    return best


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_tokens_of_weight_one_are_a_common_subsequence(chosen: list[int], rejected: list[int]) -> None:
    weights = difference_weights(chosen, rejected, changed=3.0)
    shared = [
        [t for t, w in zip(ids, ws, strict=True) if w == 1] for ids, ws in zip((chosen, rejected), weights, strict=True)
    ]
    assert shared[0] == shared[1]
    assert len(shared[0]) >= _matched(chosen, rejected)
    assert all(set(np.unique(each)) <= {1.0, 3.0} for each in weights)


def test_token_weights_stay_beside_their_tokens(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl([{"prompt": "A?\n", "chosen": "Tom has 3 eggs.", "rejected": "Tom has 4 eggs."}])
    example = prepare(path, token_weights=5.0).train[0]
    assert example.weights is not None
    for ids, weights in zip(example.responses, example.weights, strict=True):
        heavy = [bpe().decode([token]) for token, weight in zip(ids.tolist(), weights, strict=True) if weight == 5]
        assert [text.strip() for text in heavy] in (["3"], ["4"])


def test_words_that_repeat_the_prompt_are_pointed_out(prepare: Any, write_jsonl: Any) -> None:
    path = write_jsonl([{"prompt": "Eggs?\n", "chosen": "Eggs?\nYes.", "rejected": "Eggs?\nNo."}])
    assert prepare(path).report.train.noticed["prompt_repeated"].rows == 1
