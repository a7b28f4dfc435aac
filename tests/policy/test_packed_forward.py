"""Packed rows against transformers' own padded forward: the claim everything else rests on."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    EXACT_GRADIENTS,
    REFUSED_ARCHITECTURES,
    VOCABULARY,
    build,
    examples,
    plain_logps,
)
from torch import Tensor, nn

from dpo_cli.batch.layout import pack, sum_by_response
from dpo_cli.errors import ModelError
from dpo_cli.losses.types import Statistic
from dpo_cli.policy import head
from dpo_cli.policy.packed_model import PackedModel


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a fixed, uneven functional of the log-probs, so that no token's gradient can hide behind another's."""
    weights = torch.linspace(0.5, 2.0, len(logps), dtype=logps.dtype)
    model.zero_grad()
    (logps * weights + 0.1 * logps.square()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_relative_difference(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    assert wanted.keys() == found.keys()
    return max(
        ((wanted[name] - found[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-30)).item()
        for name in wanted
        if wanted[name].abs().max() > 1e-12
    )


@pytest.mark.parametrize("responses", [2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_log_probs_and_gradients_are_those_of_a_padded_forward(name: str, responses: int) -> None:
    model, rows = build(name), examples(responses=responses)
    plain = torch.cat(plain_logps(model, rows))
    wanted = gradients(model, plain)

    packed = PackedModel(model)(pack(rows)).logps
    found = gradients(model, packed)

    assert (packed - plain).abs().max() < 1e-10
    assert largest_relative_difference(wanted, found) < (1e-10 if name in EXACT_GRADIENTS else 3e-6)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "sliding" in name or name in ("gemma3", "cohere2")])
def test_the_rows_of_these_tests_are_longer_than_the_windows(name: str) -> None:
    """Else the test above would pass with windows ignored."""
    rows = examples(responses=2)
    longest = max(len(row.prompt) + len(response) for row in rows for response in row.responses)
    assert build(name).config.sliding_window < longest - 1


@pytest.mark.parametrize("name", ["qwen2", "mistral-sliding", "gemma3", "qwen3-moe"])
def test_float32_agrees_to_its_rounding(name: str) -> None:
    model, rows = build(name, dtype=torch.float32), examples(responses=2)
    plain = torch.cat(plain_logps(model, rows))
    wanted = gradients(model, plain)
    packed = PackedModel(model)(pack(rows)).logps
    assert packed.dtype == torch.float32
    assert (packed - plain).abs().max() < 2e-5
    assert largest_relative_difference(wanted, gradients(model, packed)) < 2e-5


@pytest.mark.parametrize("name", ["qwen2-tied", "phi", "gemma3-softcap", "granite", "qwen2-sliding"])
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    model, row = build(name), pack(examples(responses=3))
    packed = PackedModel(model)
    plain = packed(row).logps
    wanted = gradients(model, plain)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert model.is_activation_checkpointing
    again = packed(row).logps
    assert torch.equal(again, plain)
    assert largest_relative_difference(wanted, gradients(model, again)) == 0


EVERYTHING = frozenset(get_args(Statistic))


@pytest.mark.parametrize("name", ["qwen2", "phi", "gemma3-softcap", "cohere"])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_the_head_s_chunk_size_changes_nothing(name: str, chunk_tokens: int) -> None:
    row = pack(examples(responses=2))
    model = build(name)
    whole = PackedModel(model)(row, EVERYTHING)
    wanted = gradients(model, whole.logps)
    model = build(name)
    chunked = PackedModel(model, chunk_tokens=chunk_tokens)(row, EVERYTHING)
    assert (whole.logps - chunked.logps).abs().max() < 1e-12
    for name, statistic in whole.statistics.items():
        assert (statistic - chunked.statistics[name]).abs().max() < 1e-12
    assert largest_relative_difference(wanted, gradients(model, chunked.logps)) < 1e-6


@pytest.mark.parametrize("name", ["qwen2", "phi", "gemma3-softcap", "granite"])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_gradients_do_not_depend_on_how_many_softmaxes_are_kept(
    name: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, model = pack(examples(responses=2)), build(name)
    scored = PackedModel(model, chunk_tokens=5)(row).logps
    wanted = gradients(model, scored)
    model = build(name)
    monkeypatch.setattr(head, "CHUNK_BYTES", kept * 4 * 5 * model.config.vocab_size)
    logps = PackedModel(model, chunk_tokens=5)(row).logps
    assert torch.equal(logps, scored)
    assert len(row.targets) > 5 * kept, "nothing would be computed again"
    assert largest_relative_difference(wanted, gradients(model, logps)) < 1e-6


@pytest.mark.parametrize("name", ["qwen2", "phi"])
def test_a_second_backward_pass_finds_the_same_gradient(name: str) -> None:
    model = build(name)
    value = PackedModel(model, chunk_tokens=5)(pack(examples(responses=2))).logps.square().sum()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(value, parameters, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen2", "gemma3-softcap", "granite", "phi"])
def test_statistics_are_those_of_the_full_distribution(name: str) -> None:
    model, rows = build(name), examples(responses=1)
    scores = PackedModel(model)(pack(rows), EVERYTHING)
    entropy, correct, squared = [], [], []
    for example in rows:
        ids = torch.tensor([*example.prompt, *example.responses[0]])
        distribution = model(input_ids=ids[None]).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
        entropy.append(-(distribution.exp() * distribution).sum(-1))
        correct.append(distribution.argmax(-1) == ids[len(example.prompt) :])
        squared.append(distribution.exp().square().sum(-1).log())
    assert (scores.statistics["entropy"] - torch.cat(entropy)).abs().max() < 1e-10
    assert torch.equal(scores.statistics["correct"], torch.cat(correct).double())
    assert (scores.statistics["log_sum_squared_probs"] - torch.cat(squared)).abs().max() < 1e-10
    assert not any(statistic.requires_grad for statistic in scores.statistics.values())
    assert PackedModel(build(name))(pack(rows)).statistics == {}


@pytest.mark.parametrize("columns", [1, 67, 128, 129, 1000])
def test_the_largest_logit_is_found_where_torch_finds_it(columns: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, columns).mul_(3).round_()  # many are equal, and the first of them counts
    logits[0, columns // 2] = torch.nan
    logits[1] = -torch.inf
    values, places = logits.max(-1)
    found, found_places = head._largest(logits)
    torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found_places, places)


def test_tied_embeddings_get_the_gradient_of_both_their_uses() -> None:
    model = build("qwen2-tied")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_an_example_s_log_probs_do_not_depend_on_its_neighbours_in_the_row() -> None:
    packed, rows = PackedModel(build("qwen2-sliding")), examples(responses=2)
    together = pack(rows)
    sums = sum_by_response(together, packed(together).logps)
    alone = torch.cat([sum_by_response(row, packed(row).logps) for row in (pack([example]) for example in rows)])
    assert (sums - alone).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["qwen2-sliding", "gemma3", "qwen3-moe", "gpt2"])
def test_padding_of_the_row_changes_no_number(name: str) -> None:
    model, row = build(name), pack(examples(responses=3))
    packed = PackedModel(model)
    logps = packed(row).logps
    wanted = gradients(model, logps)
    tokens: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, __, given: tokens.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    packed.pad_rows_to = 64
    padded = packed(row).logps
    assert len(row.input_ids) % 64 and tokens == [-(-len(row.input_ids) // 64) * 64]
    assert (padded - logps).abs().max() < 1e-12
    assert largest_relative_difference(wanted, gradients(model, padded)) < 3e-6


def test_responses_of_one_example_do_not_see_each_other() -> None:
    packed, (example, *_) = PackedModel(build("llama")), examples(responses=4)
    row = pack([example])
    logps = packed(row).logps
    alone = packed(pack([example], first_responses=1)).logps
    assert (logps[row.response_of_token == 0] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe", "gemma3"])
def test_bf16_scores_the_same_row_to_the_same_bits_with_and_without_gradients(name: str) -> None:
    """What makes the loss of step 0 exactly ln 2: the reference is scored without gradients, the policy with them."""
    model, row = build(name, dtype=torch.bfloat16), pack(examples(responses=2))
    packed = PackedModel(model)
    with torch.no_grad():
        reference = packed(row).logps
    policy = packed(row).logps
    assert policy.requires_grad
    assert policy.dtype == torch.float32
    assert torch.equal(policy, reference)


@pytest.mark.parametrize("name", ["qwen2-sliding", "gemma3"])
def test_plain_calls_of_a_packed_model_still_work_and_generate(name: str) -> None:
    model, rows = build(name), examples(responses=2)
    before = torch.cat(plain_logps(model, rows))
    PackedModel(model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    assert torch.equal(torch.cat(plain_logps(model, rows)), before)
    model.eval()
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    logits = model(input_ids=generated[:, :-1]).logits
    assert torch.equal(logits[0, 7:].argmax(-1), generated[0, 8:])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_calls_under_a_mask_are_transformers_own(name: str) -> None:
    """Rows padded on either side, as in text generation, where padding on the left leaves queries that see nothing."""
    model = build(name, dtype=torch.float64).eval()
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3])
    found = []
    for route in ("packed", "sdpa"):
        model.set_attn_implementation(route)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=seen, use_cache=True)
            seen_later = torch.cat([seen, torch.ones(3, 2, dtype=seen.dtype)], dim=1)
            more = model(input_ids=ids[:, :2], attention_mask=seen_later, past_key_values=states.past_key_values)
        found.append(torch.cat([states.logits[seen.bool()], more.logits.flatten(0, 1)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", REFUSED_ARCHITECTURES)
def test_layers_that_drop_the_row_s_plan_are_refused_not_scored_wrongly(name: str) -> None:
    packed = PackedModel(build(name))
    with pytest.raises(ModelError, match="do not hand the row's plan on"):
        packed(pack(examples(responses=2)))


def test_soft_capped_attention_is_refused_not_ignored() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "packed"
    with pytest.raises(ModelError, match="softcap"):
        PackedModel(Gemma2ForCausalLM(config))(pack(examples(responses=2)))


@pytest.mark.parametrize("part", ["mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj"])
def test_the_last_layer_sees_only_rows_that_predict_a_response_token(part: str) -> None:
    model, row = build("qwen2"), pack(examples(responses=3))
    seen: dict[int, int] = {}
    for number, layer in enumerate(model.model.layers):
        # What the part gets of its own hooks, which come first.
        layer.get_submodule(part).register_forward_hook(
            lambda _, args, output, number=number: seen.update({number: args[0].shape[1]}), prepend=True
        )
    ids = torch.arange(5)[None]
    before = model(ids).logits
    PackedModel(model)(row)
    *others, last = (seen[number] for number in range(len(model.model.layers)))
    assert set(others) == {len(row.input_ids)}
    assert last == len(row.predictors.unique()) < len(row.input_ids)
    assert torch.equal(row.scored, row.predictors.unique())
    assert torch.equal(PackedModel(model)(row).logps, PackedModel(model)(row).logps)
    # A call without a plan passes all rows, after one with a plan too.
    assert torch.equal(model(ids).logits, before)
