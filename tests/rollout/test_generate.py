from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpo_cli.rollout.generate import Sampling, _choose, generate
from dpo_cli.rollout.noise import mix, stream, uniform

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


def continue_one_by_one(model: PreTrainedModel, prompt: np.ndarray, *, tokens: int) -> list[int]:
    """The definition of greedy decoding: no batch, no padding, no cache."""
    ids = [int(token) for token in prompt]
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in STOPS:
            break
    return ids[len(prompt) :]


def greedy(model, prompts, *, max_new_tokens: int = 8, pad_id: int = 0, **more) -> list[list[int]]:
    sampling = Sampling(max_new_tokens, temperature=0)
    found = generate(model, prompts, sampling, stop_token_ids=STOPS, pad_id=pad_id, **more)
    return [[int(token) for token in response] for (response,) in found]


def drawn(
    model, prompts, sampling: Sampling, *, samples: int, seed: int = 0, stops=STOPS, **more
) -> list[list[list[int]]]:
    streams = [stream(seed, number) for number in range(len(prompts))]
    found = generate(
        model, prompts, sampling, samples_per_prompt=samples, streams=streams, stop_token_ids=stops, pad_id=0, **more
    )
    return [[[int(token) for token in response] for response in each] for each in found]


@pytest.mark.parametrize("batch_tokens", [1, 90, 100_000])
def test_greedy_decoding_in_any_batches_equals_taking_the_likeliest_token_one_by_one(model, prompts, batch_tokens):
    got = greedy(model, prompts, batch_tokens=batch_tokens)
    assert got == [continue_one_by_one(model, prompt, tokens=8) for prompt in prompts]


def test_a_response_ends_with_the_first_of_several_stop_tokens_and_some_responses_never_stop(model, prompts):
    responses = greedy(model, prompts)
    assert {response[-1] for response in responses} > STOPS, "these prompts should reach both stops and neither"
    for response in responses:
        assert not STOPS & set(response[:-1])
        assert len(response) == 8 or response[-1] in STOPS


def test_a_padding_id_that_the_model_also_says_is_not_cut_from_responses(model, prompts):
    common = int(np.bincount(np.concatenate(greedy(model, prompts))).argmax())
    assert greedy(model, prompts, pad_id=common) == [continue_one_by_one(model, prompt, tokens=8) for prompt in prompts]


def test_the_models_own_generation_config_changes_nothing(model, prompts):
    plain, sampled = greedy(model, prompts), drawn(model, prompts, Sampling(8), samples=2)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, temperature=0.3, repetition_penalty=5.0, no_repeat_ngram_size=1,
        suppress_tokens=[1, 2, 4], min_new_tokens=6, num_beams=3, max_length=5, eos_token_id=9, pad_token_id=2,
        bad_words_ids=[[7]], forced_eos_token_id=8,
    )  # fmt: skip
    try:
        assert greedy(model, prompts) == plain
        assert drawn(model, prompts, Sampling(8), samples=2) == sampled
    finally:
        model.generation_config = before


def test_training_mode_is_put_back_module_by_module(model, prompts):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    greedy(model, prompts[:2], max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    model.eval()


def test_a_sample_does_not_depend_on_the_batch_it_falls_into(model, prompts):
    whole, alone = (
        drawn(model, prompts, Sampling(6, temperature=1.3), samples=3, seed=7, batch_tokens=batch_tokens)
        for batch_tokens in (100_000, 1)
    )
    assert whole == alone
    # Nor on which other prompts are asked, as long as its own stream is the same.
    streams = [stream(7, number) for number in range(len(prompts))]
    some = generate(
        model, prompts[5:9], Sampling(6, temperature=1.3), samples_per_prompt=3, streams=streams[5:9],
        stop_token_ids=STOPS, pad_id=0,
    )  # fmt: skip
    assert [[list(response) for response in each] for each in some] == whole[5:9]


def test_another_seed_draws_other_samples_and_samples_of_one_prompt_differ(model, prompts):
    first, second = (drawn(model, prompts, Sampling(6), samples=2, seed=seed) for seed in (0, 1))
    assert sum(a[0] == b[0] for a, b in zip(first, second, strict=True)) < len(prompts) / 2
    assert sum(a == b for a, b in first) < len(prompts) / 2


def test_sampling_without_a_stream_of_random_numbers_is_refused(model, prompts):
    with pytest.raises(ValueError, match="stream"):
        generate(model, prompts, Sampling(2), stop_token_ids=STOPS, pad_id=0)


@pytest.mark.parametrize("window", [2, 5])
def test_a_sliding_window_is_honoured(window):
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, initializer_range=0.5, sliding_window=window, eos_token_id=3,
    )  # fmt: skip
    model = MistralForCausalLM(config).double()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCABULARY, size=size).astype(np.int32) for size in (1, 3, 9, 12)]
    assert greedy(model, prompts) == [continue_one_by_one(model, prompt, tokens=8) for prompt in prompts]


def kept_tokens(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    """The tokens that sampling ever chooses, over many random numbers."""
    draws = uniform(torch.arange(4000), torch.zeros(1, dtype=torch.int64))
    return set(_choose(logits.expand(len(draws), -1), draws, sampling).tolist())


def test_top_k_and_top_p_keep_the_most_probable_tokens_alone():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]).log()
    assert kept_tokens(logits, Sampling(1)) == {0, 1, 2, 3, 4}
    assert kept_tokens(logits, Sampling(1, top_k=2)) == {1, 3}
    assert kept_tokens(logits, Sampling(1, top_k=99)) == {0, 1, 2, 3, 4}
    assert kept_tokens(logits, Sampling(1, top_p=0.3)) == {1}
    assert kept_tokens(logits, Sampling(1, top_p=0.64)) == {1, 3}
    assert kept_tokens(logits, Sampling(1, top_p=0.8)) == {1, 3, 4}
    assert kept_tokens(logits, Sampling(1, top_k=2, top_p=0.99)) == {1, 3}
    # An impossible token is never drawn.
    assert kept_tokens(torch.tensor([float("-inf"), 0.0, float("-inf")]), Sampling(1)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_pairs_of_tokens_follow_the_models_distribution(model, temperature):
    """Chi-square over the joint distribution of the first two tokens, at the 1-in-10,000 level."""
    prompt, draws = np.array([1, 4, 2], dtype=np.int32), 6000
    (samples,) = drawn(model, [prompt], Sampling(2, temperature), samples=draws, seed=3, stops={VOCABULARY})
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
    got = [int(word) % 2**64 for word in mix(torch.tensor(states))]
    assert got == [splitmix64(state) for state in states]
    # The generator's published first output for seed 0, which is the mix of state 1.
    assert got[1] == 0xE220A8397B1DCDAF
