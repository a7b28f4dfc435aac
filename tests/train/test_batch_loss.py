"""A step is the mean over the global batch however it is cut, coupled losses included."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from dpo_cli.batch.layout import pack, sum_by_response
from dpo_cli.data.example import Example
from dpo_cli.data.tail_weights import TailWeighted
from dpo_cli.engine.interface import OptimizerSettings
from dpo_cli.engine.ranks import SoleRank
from dpo_cli.engine.replicated import ReplicatedEngine
from dpo_cli.errors import NonFiniteError
from dpo_cli.losses.aot import aot_loss
from dpo_cli.losses.aot_unpaired import aot_unpaired_loss
from dpo_cli.losses.bco_pair import bco_pair_loss
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.kto import kto_loss
from dpo_cli.losses.mix import mix_loss
from dpo_cli.losses.pdpo import pdpo_loss
from dpo_cli.losses.plackett_luce import plackett_luce_loss
from dpo_cli.losses.sft_ref import sft_ref_loss
from dpo_cli.losses.types import LossValues, PairLogps, UnpairedLogps, declare
from dpo_cli.policy.packed_model import PackedModel, score_examples
from dpo_cli.reference.sums import ReferenceSums, weighted_sum
from dpo_cli.train.batch_loss import BatchLoss
from dpo_cli.train.metric_sums import MetricSums
from dpo_cli.train.micro_batch import MicroBatch, PreferenceData, Sampled
from dpo_cli.train.objective import Objective

CPU = torch.device("cpu")


def packed_model() -> PackedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed", dtype=torch.float64)
    return PackedModel(model)


def random_examples(count: int, responses: Callable[[int], int] = lambda _: 2, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def ids() -> Any:
        return rng.integers(0, 31, rng.integers(1, 9)).astype(np.int32)

    return [
        Example(
            prompt=ids(),
            responses=tuple(ids() for _ in range(responses(number))),
            desirable=number % 3 != 0,
            origin=f"rows.jsonl row {number + 1}",
        )
        for number in range(count)
    ]


def cut(examples: list[Example], sizes: list[int], reference: bool = True) -> list[MicroBatch]:
    micros, start = [], 0
    for size in sizes:
        part = examples[start : start + size]
        sums = tuple(np.full(len(e.responses), -7.0 - len(e.prompt)) + np.arange(len(e.responses)) for e in part)
        micros.append(MicroBatch(examples=tuple(part), references=sums if reference else None))
        start += size
    return micros


class Listed(list[Example]):
    """Examples in memory, as the data room would hand them over."""

    @property
    def sizes(self) -> Any:
        return np.array([example.packed_tokens for example in self], dtype=np.int32)


def reference_of(examples: list[Example]) -> ReferenceSums:
    counts = [len(example.responses) for example in examples]
    return ReferenceSums(
        np.arange(len(examples)), np.cumsum([0, *counts]), -np.arange(sum(counts), dtype=np.float64), data=""
    )


def gradient(loss: Callable[..., Any], micros: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor], MetricSums]:
    packed = packed_model()
    engine = ReplicatedEngine(packed, packed.model, OptimizerSettings("adamw", 0.0, None))
    outcome = BatchLoss(packed, Objective.of(loss), CPU).accumulate_gradient(micros, engine)
    grads = {n: p.grad.clone() for n, p in packed.model.named_parameters() if p.grad is not None}
    return float(outcome.loss), grads, outcome.metrics


LOSSES = {
    "dpo": (functools.partial(dpo_loss, beta=0.3, nll_alpha=0.5), 2),
    "dpo, weighted": (functools.partial(dpo_loss, beta=0.3, use_weighting=True), 2),
    "kto": (functools.partial(kto_loss, beta=0.3), 2),
    "bco_pair": (functools.partial(bco_pair_loss, beta=0.3), 2),
    "mix": (
        functools.partial(
            mix_loss,
            beta=0.3,
            losses=[
                {"loss": "dpo", "weight": 0.8, "use_weighting": True},
                {"loss": "bco_pair", "weight": 0.2},
                {"loss": "sft_ref", "weight": 1.0},
            ],
        ),
        2,
    ),
    "aot": (functools.partial(aot_loss, beta=0.3), 2),
    "aot_unpaired": (functools.partial(aot_unpaired_loss, beta=0.3), 2),
    "plackett_luce": (functools.partial(plackett_luce_loss, beta=0.3), 3),
    "sft_ref": (sft_ref_loss, 2),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [1] * 12, [7, 4, 1]])
def test_microbatches_change_neither_the_loss_nor_the_gradient_nor_the_metrics(name: str, sizes: list[int]) -> None:
    loss, responses = LOSSES[name]
    examples = random_examples(12, lambda n: responses + (n % 2 if name == "plackett_luce" else 0))
    needs_reference = name != "sft_ref"
    whole = gradient(loss, cut(examples, [12], needs_reference))
    parts = gradient(loss, cut(examples, sizes, needs_reference))
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    for parameter, expected in whole[1].items():
        torch.testing.assert_close(parts[1][parameter], expected, rtol=1e-9, atol=1e-12)
    assert parts[2].means() == pytest.approx(whole[2].means(), rel=1e-9)


def test_sft_is_the_mean_over_tokens_of_the_first_responses_only() -> None:
    examples = random_examples(5)
    packed = packed_model()
    logps = [scores[0] for scores in score_examples(packed, examples)]
    loss, _, metrics = gradient(sft_ref_loss, cut(examples, [2, 3], reference=False))
    assert loss == pytest.approx(-np.concatenate(logps).mean(), rel=1e-10)
    assert "logps/rejected" not in metrics.means()


def test_token_weights_weigh_both_the_loss_and_its_normaliser() -> None:
    examples = [
        replace(e, weights=tuple(np.linspace(0.5, 2, len(r)).astype(np.float32) for r in e.responses))
        for e in random_examples(4)
    ]
    logps = [scores[0] for scores in score_examples(packed_model(), examples)]
    weights = [e.weights[0].astype(np.float64) for e in examples]
    expected = -sum((w * x).sum() for w, x in zip(weights, logps, strict=True)) / sum(w.sum() for w in weights)
    loss, _, _ = gradient(sft_ref_loss, cut(examples, [4], reference=False))
    assert loss == pytest.approx(expected, rel=1e-10)


def test_what_tails_weigh_reaches_policy_and_reference_alike() -> None:
    """LD-DPO through the packed row and the reference's sums, against the formula on token log-probs."""
    examples = Listed(random_examples(8))
    loss = functools.partial(dpo_loss, beta=0.3, ld_alpha=0.25)
    weighted = TailWeighted(examples, Objective.of(loss).declaration.tail_weight)
    scores, margins, sums = score_examples(packed_model(), examples), [], []
    rng = np.random.default_rng(1)
    for number, example in enumerate(examples):
        shared = min(map(len, example.responses))
        reference = [-3 * rng.random(len(ids)).astype(np.float32) for ids in example.responses]
        ratios = [
            ours[:shared].astype(float).sum() - theirs[:shared].sum(dtype=float)
            + 0.25 * (ours[shared:].astype(float).sum() - theirs[shared:].sum(dtype=float))
            for ours, theirs in zip(scores[number], reference, strict=True)
        ]  # fmt: skip
        margins.append(0.3 * (ratios[0] - ratios[1]))
        weights = weighted[number].weights
        assert weights is not None
        sums.append(np.array([weighted_sum(r, w) for r, w in zip(reference, weights, strict=True)]))
    rows = tuple(weighted[number] for number in range(8))
    value, _, _ = gradient(loss, [MicroBatch(rows[:5], tuple(sums[:5])), MicroBatch(rows[5:], tuple(sums[5:]))])
    assert value == pytest.approx(np.logaddexp(0, -np.array(margins)).mean(), rel=1e-6)
    assert value != pytest.approx(gradient(loss, [MicroBatch(tuple(examples), tuple(sums))])[0], rel=1e-2)


def test_a_coupled_loss_gets_the_gradient_of_the_whole_batch_at_once() -> None:
    """Against autograd through one undivided forward, for a loss in which every value touches every other."""

    @declare(couples_batch=True)
    def entangled(pair: PairLogps, *, beta: float) -> LossValues:
        margins = beta * (pair.policy_chosen - pair.policy_rejected)
        return LossValues(values=(margins - margins.mean()).square() + margins)

    loss = functools.partial(entangled, beta=0.2)
    examples = random_examples(9)
    _, found, _ = gradient(loss, cut(examples, [2, 4, 3]))

    packed = packed_model()
    row = pack(examples)
    sums = sum_by_response(row, packed(row).logps)
    margins = 0.2 * (sums[0::2] - sums[1::2])
    (((margins - margins.mean()).square() + margins).sum() / 9).backward()
    for name, parameter in packed.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_loss_gets_the_statistics_it_declares_summed_by_response(coupled: bool) -> None:
    seen = []

    @declare(statistics=["entropy", "log_sum_squared_probs"], couples_batch=coupled)
    def weighted(pair: PairLogps) -> LossValues:
        seen.append(pair.statistics)
        return LossValues(values=-pair.policy_chosen)

    examples = random_examples(6)
    gradient(weighted, cut(examples, [6]))
    packed = packed_model()
    scores = packed(pack(examples), frozenset({"entropy", "log_sum_squared_probs"}))
    assert seen[0].keys() == {"entropy", "log_sum_squared_probs"}
    for name, found in seen[0].items():
        expected = sum_by_response(pack(examples), scores.statistics[name]).view(-1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert not found.requires_grad


def test_ktos_divergence_is_taken_over_the_global_batch() -> None:
    seen = []

    @declare(couples_batch=True)
    def spy(unpaired: UnpairedLogps) -> LossValues:
        seen.append(len(unpaired.kl_policy))
        return kto_loss(unpaired, beta=0.1)

    gradient(spy, cut(random_examples(10), [3, 3, 4]))
    assert seen == [10]


@pytest.mark.parametrize("name", ["dpo", "plackett_luce"])
def test_a_policy_equal_to_its_reference_starts_where_the_paper_says(name: str) -> None:
    loss, responses = {
        "dpo": (functools.partial(dpo_loss, beta=0.3), 2),
        "plackett_luce": (functools.partial(plackett_luce_loss, beta=0.3), 4),
    }[name]
    examples = random_examples(6, lambda _: responses)
    packed = packed_model()
    sums = tuple(np.array([r.sum() for r in row]) for row in score_examples(packed, examples))
    loss_value, _, metrics = gradient(loss, [MicroBatch(tuple(examples), sums)])
    assert loss_value == pytest.approx(math.log(math.factorial(responses)), abs=1e-10)
    assert metrics.means()["rewards/margins"] == pytest.approx(0, abs=1e-10)


def test_rows_that_break_the_loss_are_named_and_the_weights_stay() -> None:
    packed = packed_model()
    engine = ReplicatedEngine(packed, packed.model, OptimizerSettings("adamw", 0.0, None))
    micros = cut(random_examples(6), [3, 3])
    broken = list(micros[1].references)
    broken[1] = np.array([np.nan, 0.0])
    micros[1] = MicroBatch(micros[1].examples, tuple(broken))
    before = {saved.name: saved.tensor.clone() for saved in engine.saved_tensors()}
    loss = BatchLoss(packed, Objective.of(functools.partial(dpo_loss, beta=0.3)), CPU)
    outcome = loss.accumulate_gradient(micros, engine)
    assert not torch.isfinite(outcome.loss)
    assert not engine.step(1e-3, outcome.loss).sound
    error = loss.blame(micros, engine)
    assert isinstance(error, NonFiniteError)
    assert error.where == "rows.jsonl row 5"
    assert all(torch.equal(saved.tensor, before[saved.name]) for saved in engine.saved_tensors())


def test_unpaired_metrics_are_means_over_their_own_side() -> None:
    examples = random_examples(7)
    _, _, metrics = gradient(functools.partial(kto_loss, beta=0.5), cut(examples, [7]))
    means = metrics.means()
    packed = packed_model()
    sums = [row[0].sum() for row in score_examples(packed, examples)]
    chosen = [s for s, e in zip(sums, examples, strict=True) if e.desirable]
    rejected = [s for s, e in zip(sums, examples, strict=True) if not e.desirable]
    assert means["logps/chosen"] == pytest.approx(np.mean(chosen))
    assert means["logps/rejected"] == pytest.approx(np.mean(rejected))


@pytest.mark.parametrize("name", ["dpo", "kto", "sft_ref"])
def test_token_accuracy_is_the_first_responses_and_entropy_that_of_what_is_trained(name: str) -> None:
    """Not of responses that KTO borrows from other prompts, nor of worse ones that ride along with demonstrations."""
    loss, _ = LOSSES[name]
    examples = random_examples(9)
    packed, found = packed_model(), {}
    asked: frozenset[Any] = frozenset({"entropy", "correct"})
    for responses in (1, 2):
        statistics = [packed(pack([e], first_responses=responses), asked).statistics for e in examples]
        found[responses] = {key: torch.cat([each[key] for each in statistics]).mean().item() for key in asked}
    data = PreferenceData(Listed(examples), reference_of(examples))
    evaluated = BatchLoss(packed, Objective.of(loss), CPU).evaluate(data, global_pairs=4, tokens_per_microbatch=40)
    trained = gradient(loss, cut(examples, [4, 5]))[2].means()
    for metrics in (evaluated, trained):
        assert metrics["mean_token_accuracy"] == pytest.approx(found[1]["correct"])
        assert metrics["entropy"] == pytest.approx(found[2 if name == "dpo" else 1]["entropy"])


# --- samples of the policy beside the data ---------------------------------------------------------------------------

PDPO = functools.partial(pdpo_loss, beta=0.3, gamma=0.7)


def sampled_rows(count: int, samples: int = 2, seed: int = 5) -> list[Sampled]:
    rows = random_examples(count, lambda _: 1 + samples, seed=seed)
    rng = np.random.default_rng(seed)
    drawn = tuple(range(1, 1 + samples))
    return [
        Sampled(replace(row, origin=f"truth {n}"), -9 * rng.random(1 + samples), drawn) for n, row in enumerate(rows)
    ]


def mixed(examples: list[Example], sampled: list[Sampled], budget: int, ranks: int = 1) -> list[list[MicroBatch]]:
    """The micro-batches of each rank."""
    data = PreferenceData(Listed(examples), reference_of(examples))
    found = []
    for rank in range(ranks):
        this = SoleRank()
        this.rank, this.size = rank, ranks
        indices = np.arange(len(examples))
        found.append(data.microbatches(indices, tokens_per_microbatch=budget, ranks=this, sampled=sampled))
    return found


@pytest.mark.parametrize("generator", ["hinge", "unhinged", "policy_gradient"])
def test_pdpos_loss_is_that_of_the_pairs_and_gamma_times_that_of_the_samples(generator: str) -> None:
    """Against autograd through one undivided forward and the formulas; no gradient reaches the ground truths."""
    examples, sampled = random_examples(7), sampled_rows(4)
    loss = functools.partial(PDPO, generator=generator, advantage_clip=0.5)
    (micros,) = mixed(examples, sampled, budget=10_000)
    assert len(micros) == 1 and len(micros[0].drawn) == 4
    value, found, _ = gradient(loss, micros)

    packed = packed_model()
    row = pack(examples)
    sums, reference = sum_by_response(row, packed(row).logps), torch.arange(14, dtype=torch.float64).neg()
    margins = 0.3 * ((sums - reference)[0::2] - (sums - reference)[1::2])
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    row = pack([each.example for each in sampled])
    sums = sum_by_response(row, packed(row).logps).view(4, 3)
    rewards = 0.3 * (sums - torch.from_numpy(np.stack([each.reference for each in sampled])))
    gaps = rewards[:, :1].detach() - rewards[:, 1:]
    terms = {"hinge": gaps.relu(), "unhinged": gaps, "policy_gradient": gaps.detach().clamp(-0.5, 0.5) * sums[:, 1:]}
    expected = expected + 0.7 * terms[generator].mean()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    for name, parameter in packed.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_pdpos_gradient_is_the_slope_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """By central differences, with the samples and the rewards of the ground truths held fixed."""

    def norm(self: Qwen2RMSNorm, x: torch.Tensor) -> torch.Tensor:
        """Without transformers' detour through float32, whose steps are coarser than the differences taken here."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm)
    examples, sampled = random_examples(5), sampled_rows(4)
    (micros,) = mixed(examples, sampled, budget=60)
    assert len(micros) > 1
    _, found, _ = gradient(PDPO, micros)
    packed = packed_model()
    truths = {
        each.example.origin: score_examples(packed, [each.example])[0][0].astype(np.float64).sum() for each in sampled
    }

    def formula() -> float:
        pairs = [[s.astype(np.float64).sum() for s in row] for row in score_examples(packed, examples)]
        margins = np.array([0.3 * ((w + 2 * n) - (r + 2 * n + 1)) for n, (w, r) in enumerate(pairs)])
        gaps = []
        for example, reference, _ in sampled:
            drawn = [s.astype(np.float64).sum() for s in score_examples(packed, [example])[0][1:]]
            truth = 0.3 * (truths[example.origin] - reference[0])
            gaps += [truth - 0.3 * (logp - own) for logp, own in zip(drawn, reference[1:], strict=True)]
        return float(np.logaddexp(0, -margins).mean() + 0.7 * np.maximum(gaps, 0).mean())

    rng = np.random.default_rng(0)
    for name, parameter in packed.model.named_parameters():
        flat, slopes = parameter.data.view(-1), found[name].view(-1)
        for place in rng.choice(len(flat), size=min(3, len(flat)), replace=False).tolist():
            kept, width = flat[place].clone(), 1e-5
            flat[place] = kept + width
            above = formula()
            flat[place] = kept - width
            below = formula()
            flat[place] = kept
            assert (above - below) / (2 * width) == pytest.approx(float(slopes[place]), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("budget", [10_000, 60, 25])
def test_samples_are_cut_into_microbatches_without_changing_anything(budget: int) -> None:
    examples, sampled = random_examples(9), sampled_rows(5, samples=3)
    (whole,), (parts,) = mixed(examples, sampled, budget=10_000), mixed(examples, sampled, budget=budget)
    assert sum(len(micro.drawn) for micro in parts) == 5
    first, second = gradient(PDPO, whole), gradient(PDPO, parts)
    assert second[0] == pytest.approx(first[0], rel=1e-12)
    for name, expected in first[1].items():
        torch.testing.assert_close(second[1][name], expected, rtol=1e-9, atol=1e-12)
    assert second[2].means() == pytest.approx(first[2].means(), rel=1e-9)


def test_ranks_share_samples_and_pairs_and_do_equally_many_passes() -> None:
    examples, sampled = random_examples(9), sampled_rows(5)
    shares = mixed(examples, sampled, budget=45, ranks=3)
    assert len({len(share) for share in shares}) == 1
    shown = [e.origin for share in shares for micro in share if not micro.idle for e in micro.examples]
    assert sorted(shown) == sorted([*(e.origin for e in examples), *(s.example.origin for s in sampled)])
    for share in shares:
        for micro in share:
            assert all(e.origin.startswith("truth") for e in micro.examples[len(micro.preferences) :])
            assert not any(e.origin.startswith("truth") for e in micro.preferences)


def test_what_the_policy_wrote_is_in_no_metric_of_the_data() -> None:
    examples, sampled = random_examples(6), sampled_rows(3)
    (micros,) = mixed(examples, sampled, budget=60)
    alone = gradient(functools.partial(dpo_loss, beta=0.3), mixed(examples, [], budget=60)[0])[2].means()
    beside = gradient(PDPO, micros)[2].means()
    assert {name: beside[name] for name in alone} == pytest.approx(alone, rel=1e-12)
    assert set(beside) - set(alone) == {
        "loss/dpo", "loss/generator", "generator/active_fraction", "generator/reward_gap", "generator/kl"
    }  # fmt: skip


@pytest.mark.parametrize("loss", [
    PDPO,
    functools.partial(PDPO, generator="unhinged"),
    functools.partial(PDPO, generator="policy_gradient", baseline="leave_one_out"),
])  # fmt: skip
def test_what_is_said_twice_teaches_as_if_it_had_been_computed_twice(loss: Any) -> None:
    examples, rows = random_examples(3), sampled_rows(4, samples=3)
    once, twice = [], []
    for (truth, first, second, _), reference in ((row.example.responses, row.reference) for row in rows):
        said, places = [truth, first, truth, second, first], [0, 1, 0, 2, 1]
        example = replace(rows[len(once)].example, responses=tuple(said))
        twice.append(Sampled(example, reference[places], (1, 2, 3, 4)))
        once.append(Sampled.of(replace(example, responses=(truth,)), said[1:], reference[places]))
        assert once[-1].drawn == (1, 0, 2, 1) and len(once[-1].example.responses) == 3
    (deduplicated,), (plain,) = mixed(examples, once, budget=1000), mixed(examples, twice, budget=1000)
    assert sum(len(pack(micro.examples).input_ids) for micro in deduplicated) < sum(
        len(pack(micro.examples).input_ids) for micro in plain
    )
    first, second = gradient(loss, deduplicated), gradient(loss, plain)
    assert second[0] == pytest.approx(first[0], rel=1e-12)
    for name, expected in first[1].items():
        torch.testing.assert_close(second[1][name], expected, rtol=1e-9, atol=1e-12)
    assert second[2].means() == pytest.approx(first[2].means(), rel=1e-9)


def test_a_sample_that_says_what_the_truth_says_has_no_gap_to_it_whatever_the_rounding() -> None:
    (row,) = sampled_rows(1, samples=1)
    truth = row.example.responses[0]
    same = Sampled.of(row.example, [truth.copy()], np.array([-3.0, -3.0 - 1e-7]))
    (micros,) = mixed(random_examples(2), [same], budget=1000)
    means = gradient(PDPO, micros)[2].means()
    assert means["generator/reward_gap"] == 0
    assert means["generator/active_fraction"] == 0


def test_a_sample_that_breaks_the_loss_is_named_by_its_prompt() -> None:
    packed = packed_model()
    engine = ReplicatedEngine(packed, packed.model, OptimizerSettings("adamw", 0.0, None))
    sampled = sampled_rows(3)
    sampled[1].reference[2] = np.nan
    (micros,) = mixed(random_examples(4), sampled, budget=40)
    loss = BatchLoss(packed, Objective.of(PDPO), CPU)
    outcome = loss.accumulate_gradient(micros, engine)
    assert not engine.step(1e-3, outcome.loss).sound
    assert loss.blame(micros, engine).where == "truth 1"
