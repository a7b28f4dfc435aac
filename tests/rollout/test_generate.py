from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from dpo_cli.rollout.generate import _mix, generate_greedy, sample

VOCABULARY = 17
STOPS = frozenset({3, 5})


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, initializer_range=0.5, bos_token_id=None, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double()


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, VOCABULARY, size=size).astype(np.int32) for size in draw.integers(1, 12, size=40)]


def continue_one_by_one(model: Qwen2ForCausalLM, prompt: np.ndarray, *, tokens: int) -> list[int]:
    """The definition of greedy decoding: no batch, no padding, no cache."""
    ids = [int(token) for token in prompt]
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in STOPS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_tokens", [1, 90, 100_000])
def test_greedy_decoding_in_any_batches_equals_taking_the_likeliest_token_one_by_one(model, prompts, batch_tokens):
    got = generate_greedy(model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_id=0, batch_tokens=batch_tokens)
    assert [list(response) for response in got] == [continue_one_by_one(model, prompt, tokens=8) for prompt in prompts]


def test_a_response_ends_with_the_first_of_several_stop_tokens_and_some_responses_never_stop(model, prompts):
    responses = generate_greedy(model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_id=0)
    assert {int(response[-1]) for response in responses} > STOPS, "these prompts should reach both stops and neither"
    for response in responses:
        assert not STOPS & set(response[:-1].tolist())
        assert len(response) == 8 or int(response[-1]) in STOPS


def test_a_padding_id_that_the_model_also_says_is_not_cut_from_responses(model, prompts):
    common = int(np.bincount(np.concatenate(generate_greedy(
        model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_id=0
    ))).argmax())  # fmt: skip
    padded_with_it = generate_greedy(model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_id=common)
    for prompt, response in zip(prompts, padded_with_it, strict=True):
        assert list(response) == continue_one_by_one(model, prompt, tokens=8)


def test_the_models_own_generation_config_changes_nothing_and_is_put_back(model, prompts):
    plain = generate_greedy(model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_id=0)
    drawn = sample(
        model, prompts, samples_per_prompt=2, temperature=1.0, seed=0, max_new_tokens=8, stop_token_ids=STOPS, pad_id=0
    )
    before = model.generation_config
    own = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, temperature=0.3, repetition_penalty=5.0, no_repeat_ngram_size=1,
        suppress_tokens=[1, 2, 4], min_new_tokens=6, num_beams=3, max_length=5, eos_token_id=9, pad_token_id=2,
        bad_words_ids=[[7]], forced_eos_token_id=8,
    )  # fmt: skip
    model.generation_config = own
    try:
        again = generate_greedy(model, prompts, max_new_tokens=8, stop_token_ids=STOPS, pad_id=0)
        drawn_again = sample(
            model, prompts, samples_per_prompt=2, temperature=1.0, seed=0, max_new_tokens=8, stop_token_ids=STOPS,
            pad_id=0,
        )  # fmt: skip
        assert model.generation_config is own
    finally:
        model.generation_config = before
    assert [list(response) for response in again] == [list(response) for response in plain]
    assert [list(r) for pair in drawn_again for r in pair] == [list(r) for pair in drawn for r in pair]


def test_training_mode_is_put_back_module_by_module(model, prompts):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generate_greedy(model, prompts[:2], max_new_tokens=2, stop_token_ids=STOPS, pad_id=0)
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_a_sample_does_not_depend_on_the_batch_it_falls_into(model, prompts):
    whole, alone = (
        sample(
            model, prompts, samples_per_prompt=3, temperature=1.3, seed=7, max_new_tokens=6, stop_token_ids=STOPS,
            pad_id=0, batch_tokens=batch_tokens,
        )
        for batch_tokens in (100_000, 1)
    )  # fmt: skip
    assert [list(r) for triple in whole for r in triple] == [list(r) for triple in alone for r in triple]


def test_another_seed_draws_other_samples_and_samples_of_one_prompt_differ(model, prompts):
    first, second = (
        sample(
            model, prompts, samples_per_prompt=2, temperature=1.0, seed=seed, max_new_tokens=6, stop_token_ids=STOPS,
            pad_id=0,
        )
        for seed in (0, 1)
    )  # fmt: skip
    assert sum(list(a[0]) == list(b[0]) for a, b in zip(first, second, strict=True)) < len(prompts) / 2
    assert sum(list(a) == list(b) for a, b in first) < len(prompts) / 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_pairs_of_tokens_follow_the_models_distribution(model, temperature):
    """Chi-square over the joint distribution of the first two tokens, at the 1-in-10,000 level."""
    prompt, draws = np.array([1, 4, 2], dtype=np.int32), 6000
    (samples,) = sample(
        model, [prompt], samples_per_prompt=draws, temperature=temperature, seed=3, max_new_tokens=2,
        stop_token_ids={VOCABULARY}, pad_id=0,
    )  # fmt: skip
    with torch.no_grad():
        start = torch.from_numpy(prompt.astype(np.int64))
        first = (model(start[None]).logits[0, -1] / temperature).softmax(-1)
        longer = torch.stack([torch.cat([start, torch.tensor([token])]) for token in range(VOCABULARY)])
        joint = (first[:, None] * (model(longer).logits[:, -1] / temperature).softmax(-1)).numpy().ravel()
    counts = np.zeros(VOCABULARY**2)
    for response in samples:
        counts[response[0] * VOCABULARY + response[1]] += 1
    often = joint * draws >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(joint[often], joint[~often].sum()) * draws
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is close to normal.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert abs(z) < 3.9


def test_the_noise_keys_are_splitmix64s_outputs():
    def splitmix64(state: int) -> int:
        word = 2**64 - 1
        z = state * 0x9E3779B97F4A7C15 & word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & word
        return z ^ (z >> 31)

    states = [0, 1, 2, 12345, 2**63 - 1]
    got = [int(word) % 2**64 for word in _mix(torch.tensor(states))]
    assert got == [splitmix64(state) for state in states]
    # The generator's published first output for seed 0, which is the mix of state 1.
    assert got[1] == 0xE220A8397B1DCDAF
