"""Drafts change how many forward passes sampling takes, and nothing that is sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dpo_cli.rollout.cache import GrowingLayer
from dpo_cli.rollout.draft import Draft, Width
from dpo_cli.rollout.generate import Sampling, generate
from dpo_cli.rollout.next_logits import next_logits
from dpo_cli.rollout.noise import stream

VOCABULARY = 17
STOPS = frozenset({3, 5})
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "initializer_range": 0.5, "bos_token_id": None,
    "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).double()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCABULARY, size=size).astype(np.int32) for size in draw.integers(1, 12, size=15)]


@pytest.fixture
def passes(model: Qwen2ForCausalLM) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what goes through the model."""
    shapes: list[tuple[int, ...]] = []
    next_logits(model)  # tries the model once, which is no pass of a sample's
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    hook.remove()


def sampled(model: Any, prompts: Any, sampling: Sampling, *, stops: Any = STOPS, **more: Any) -> list[list[list[int]]]:
    streams = [stream(1, number) for number in range(len(prompts))]
    found = generate(model, prompts, sampling, streams=streams, stop_token_ids=stops, pad_id=0, **more)
    return [[response.tolist() for response in each] for each in found]


def disturbed(responses: list[list[list[int]]], *, seed: int) -> list[np.ndarray]:
    """Each prompt's first response with tokens replaced, left out and put in, here and there."""
    draw, drafts = np.random.default_rng(seed), []
    for first, *_ in responses:
        text = []
        for token in first:
            other = int(draw.integers(VOCABULARY))
            text += {0: [other], 1: [], 2: [token, other]}.get(int(draw.integers(12)), [token])
        drafts.append(np.array(text, dtype=np.int32))
    return drafts


@pytest.mark.parametrize(
    ("sampling", "stops"),
    [
        (Sampling(25), STOPS),
        (Sampling(25), {VOCABULARY}),
        (Sampling(25, 1.5, top_p=0.8), {VOCABULARY}),
        (Sampling(25, 0.7, top_k=4), STOPS),
        (Sampling(25, 0), STOPS),
        (Sampling(1), STOPS),
    ],
    ids=str,
)
def test_the_samples_are_those_without_drafts(model, prompts, sampling, stops) -> None:
    plain = sampled(model, prompts, sampling, samples_per_prompt=2, stops=stops)
    draw = np.random.default_rng(1)
    unrelated = [draw.integers(0, VOCABULARY, size=size).astype(np.int32) for size in draw.integers(0, 40, 15)]
    near, others = (disturbed(plain, seed=seed) for seed in (0, 1))
    for drafts, batch_tokens in ((near, 100_000), (others, 160), (unrelated, 300)):
        got = sampled(
            model, prompts, sampling, samples_per_prompt=2, stops=stops, drafts=drafts, batch_tokens=batch_tokens
        )
        assert got == plain


def test_a_right_draft_is_taken_in_one_pass_and_a_nearly_right_one_in_few(model, prompts, passes) -> None:
    # So few that even a whole response of each costs less than another pass.
    prompts = prompts[:4]
    plain = sampled(model, prompts, Sampling(30), stops={VOCABULARY})
    assert len(passes) == 30
    passes.clear()
    right = [np.array(first, dtype=np.int32) for (first,) in plain]
    assert sampled(model, prompts, Sampling(30), stops={VOCABULARY}, drafts=right) == plain
    assert len(passes) == 1
    passes.clear()
    # A token missing or too many in some, another in others: found again by its neighbours.
    nearly = [np.delete(text, 20) if place % 2 else np.insert(text, 10, 4) for place, text in enumerate(right)]
    assert sampled(model, prompts, Sampling(30), stops={VOCABULARY}, drafts=nearly) == plain
    assert len(passes) < 9


def test_gaps_that_refused_guesses_leave_in_the_cache_are_closed_before_it_outgrows_its_batch(
    model, prompts, passes, monkeypatch
) -> None:
    """Rows whose drafts end well after one another: what one has, the others have gaps for."""
    closed, close = [], GrowingLayer.select_tokens

    def noted(layer: GrowingLayer, columns: torch.Tensor) -> None:
        closed.append(columns.shape)
        close(layer, columns)

    monkeypatch.setattr(GrowingLayer, "select_tokens", noted)
    plain = sampled(model, prompts, Sampling(60), stops={VOCABULARY})
    drafts = []
    for place, (first,) in enumerate(plain):
        text, wrong = np.array(first, dtype=np.int32), np.arange(60) // 4 % len(plain) != place
        drafts.append(np.where(wrong, (text + 1) % VOCABULARY, text).astype(np.int32))
    assert sampled(model, prompts, Sampling(60), stops={VOCABULARY}, drafts=drafts) == plain
    assert closed


def test_no_guess_stands_where_the_model_has_no_position() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    model, prompts = GPT2LMHeadModel(config).double(), [np.arange(size, dtype=np.int32) for size in (2, 4)]
    plain = sampled(model, prompts, Sampling(20), stops={VOCABULARY}, samples_per_prompt=4)
    drafts = [np.tile(each[0], 3).astype(np.int32) for each in plain]
    assert sampled(model, prompts, Sampling(20), stops={VOCABULARY}, samples_per_prompt=4, drafts=drafts) == plain


def test_models_with_a_sliding_window_sample_as_without_drafts(prompts) -> None:
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).double()
    plain = sampled(model, prompts, Sampling(20))
    assert sampled(model, prompts, Sampling(20), drafts=disturbed(plain, seed=0)) == plain


def test_guesses_follow_the_last_tokens_where_they_stand_nearest_else_the_place(model) -> None:
    text = np.array([1, 2, 3, 4, 1, 2, 5, 6, 7], dtype=np.int32)

    def after(*written: int, count: int) -> list[int]:
        draft = Draft([text], Width(model, 1), torch.device("cpu"))
        last = [Draft.NONE] * 3 + list(written)
        draft.follow(torch.tensor([last[-3:]]), torch.tensor([count]))
        return [int(token) for token in draft.guess(2)[0]]

    assert after(1, count=1) == [2, 3], "agreed so far"
    assert after(9, count=1) == [2, 3], "one token replaced"
    assert after(9, 2, 3, count=3) == [4, 1], "back in step by two tokens"
    assert after(8, 8, 4, 1, 2, count=5) == [5, 6], "three tokens tell apart what two do not"
    assert after(8, 1, 2, count=3) == [3, 4], "of two such places the nearer"


def test_the_worse_the_guesses_and_the_dearer_a_token_the_fewer_are_tested(model) -> None:
    def best(right: int, wrong: int, rows: int) -> int:
        width = Width(model, rows)
        for _ in range(5):
            width.tested(right, wrong)
        return width.best(rows, 100)

    assert best(60, 0, 8) == 63
    assert best(60, 0, 8) > best(20, 8, 8) > best(1, 8, 8) > 0, "beside this model's passes tokens cost next to nothing"
    assert best(20, 8, 8) > best(20_000, 8_000, 8_000)
    assert Width(model, 10**9).best(10**9, 100) == 0, "logits of so many rows fill memory as it is"
