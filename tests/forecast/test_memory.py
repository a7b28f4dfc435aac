"""Memory, disk and time against sums done by hand, and against what autograd really keeps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from forecast_shapes import QWEN2_HALF_BILLION, QWEN2_SEVEN_BILLION

from dpo_cli.forecast.cost import Batch, forecast_disk, forecast_step
from dpo_cli.forecast.layout import REDUCE_BUCKET, Layout, LoraLayout, Row, SamplingLayout
from dpo_cli.forecast.memory import (
    ACTIVATIONS,
    ATTENTION,
    BUCKETS,
    CACHE,
    CHUNK_BYTES,
    CHUNK_TOKENS,
    GRADIENTS,
    HEAD,
    MASTERS,
    OPTIMIZER,
    PARAMETERS,
    REFERENCE,
    Moment,
    forecast_memory,
    trained_parameters,
)
from dpo_cli.forecast.shape import ModelShape

SMALL, LARGE = ModelShape.of(QWEN2_HALF_BILLION), ModelShape.of(QWEN2_SEVEN_BILLION)
N_SMALL, N = 494_032_768, 7_615_616_512
ONE_GPU = Layout(tokens=8192, longest=1024, bytes_per_weight=2)


def test_one_gpu_in_bfloat16_keeps_eighteen_bytes_a_parameter() -> None:
    stays = forecast_memory(LARGE, ONE_GPU).stays
    assert stays[PARAMETERS] == 2 * N
    assert stays[MASTERS] == 4 * N
    assert stays[GRADIENTS] == 4 * N
    assert stays[OPTIMIZER] == 8 * N
    assert stays[BUCKETS] == 0


def test_float32_weights_are_their_own_masters_on_one_device() -> None:
    stays = forecast_memory(SMALL, replace(ONE_GPU, bytes_per_weight=4)).stays
    assert stays[PARAMETERS] == stays[GRADIENTS] == 4 * N_SMALL
    assert stays[MASTERS] == 0


SAMPLING = SamplingLayout(tokens=32_768, longest=1024, frozen_reference=True)


def test_a_policy_that_samples_keeps_its_reference_and_for_a_while_a_cache() -> None:
    plain, sampling = forecast_memory(LARGE, ONE_GPU), forecast_memory(LARGE, replace(ONE_GPU, sampling=SAMPLING))
    assert sampling.stays == plain.stays | {REFERENCE: 2 * N}
    (moment,) = [each for each in sampling.moments if each.name == "the sampling of responses"]
    # 28 layers of 4 key and 4 value heads of 128, two bytes each, and a quarter more room than is filled.
    assert moment.lines[CACHE] == round(1.25 * 32_768 * 28 * 2 * 4 * 128 * 2)
    assert moment.lines[GRADIENTS] == -4 * N
    adapted = replace(ONE_GPU, lora=LoraLayout(16), sampling=replace(SAMPLING, frozen_reference=False))
    assert REFERENCE not in forecast_memory(LARGE, adapted).stays


def test_partitioned_weights_are_whole_while_the_policy_samples() -> None:
    layout = replace(ONE_GPU, zero_stage=3, workers=8, sampling=SAMPLING)
    memory = forecast_memory(LARGE, layout)
    assert memory.stays[REFERENCE] == 2 * N // 8
    (moment,) = [each for each in memory.moments if each.name == "the sampling of responses"]
    assert memory.stays[PARAMETERS] + moment.lines[PARAMETERS] == 2 * N
    offloaded = forecast_memory(LARGE, replace(layout, offload_parameters="cpu"))
    assert offloaded.stays[REFERENCE] == 0
    without = forecast_memory(LARGE, replace(layout, offload_parameters="cpu", sampling=None))
    assert offloaded.host - without.host == 2 * N // 8 * 8


def test_rmsprop_keeps_one_moment_less() -> None:
    assert forecast_memory(SMALL, replace(ONE_GPU, optimizer="rmsprop")).stays[OPTIMIZER] == 4 * N_SMALL
    assert forecast_memory(SMALL, replace(ONE_GPU, optimizer="rmsprop", momentum=True)).stays[OPTIMIZER] == 8 * N_SMALL


@pytest.mark.parametrize(
    ("stage", "divided"),
    [
        (0, ()),
        (1, (MASTERS, OPTIMIZER)),
        (2, (MASTERS, OPTIMIZER, GRADIENTS)),
        (3, (MASTERS, OPTIMIZER, GRADIENTS)),
    ],
)
def test_each_stage_divides_what_zero_says(stage: Any, divided: tuple[str, ...]) -> None:
    alone = forecast_memory(LARGE, ONE_GPU).stays
    memory = forecast_memory(LARGE, replace(ONE_GPU, zero_stage=stage, workers=8))
    for line in (MASTERS, OPTIMIZER, GRADIENTS):
        assert memory.stays[line] == alone[line] // (8 if line in divided else 1)
    assert memory.stays[PARAMETERS] == (2 * N // 8 if stage == 3 else 2 * N)
    # Beside its share stage 3 has the weights that are gathered: at most 1e9 at a time by DeepSpeed's default.
    assert memory.at_most(PARAMETERS) == (2 * N // 8 + 2 * 10**9 if stage == 3 else 2 * N)


def test_weights_are_gathered_from_others_only() -> None:
    alone = replace(ONE_GPU, zero_stage=3, workers=1)
    assert forecast_memory(SMALL, alone).at_most(PARAMETERS) == 2 * N_SMALL
    # From the host they are fetched all the same.
    fetched = forecast_memory(SMALL, replace(alone, offload_parameters="cpu"))
    assert (fetched.stays[PARAMETERS], fetched.at_most(PARAMETERS)) == (0, 2 * N_SMALL)


def moments(shape: ModelShape, layout: Layout) -> dict[str, Moment]:
    return {moment.name: moment for moment in forecast_memory(shape, layout).moments}


def test_gradients_are_exchanged_in_buckets_of_what_the_engine_asks_for() -> None:
    reduced = "the reduction of gradients"
    embedding = 151936 * 896
    two = replace(ONE_GPU, workers=2)
    # Whole copies: one tensor at a time, the largest of which is the embedding matrix.
    assert moments(SMALL, replace(two, zero_stage=0))[reduced].lines[BUCKETS] == 4 * embedding
    # Stage 1 in bfloat16: one copy of all. Stage 2: a bucket of rounded gradients; of the embeddings, which are larger
    # than a bucket, a rounded copy and one in float32.
    assert moments(SMALL, replace(two, zero_stage=1))[reduced].lines[BUCKETS] == 4 * N_SMALL
    assert moments(SMALL, replace(two, zero_stage=2))[reduced].lines[BUCKETS] == 2 * 10**8 + (2 + 4) * embedding
    # Stage 3 keeps its bucket, in float32, and sorts it by worker in a copy.
    third = replace(two, zero_stage=3)
    assert forecast_memory(SMALL, third).stays[BUCKETS] == 4 * 10**8
    assert moments(SMALL, third)[reduced].lines[BUCKETS] == 4 * embedding
    # Adapters do not fill one.
    adapters = replace(third, lora=LoraLayout(16))
    assert forecast_memory(SMALL, adapters).stays[BUCKETS] == 4 * trained_parameters(SMALL, adapters)


def test_other_bounds_than_the_usual_are_counted() -> None:
    third = replace(ONE_GPU, zero_stage=3, workers=8)
    # On a GPU a bucket is as large as was asked for, whatever there is to fill it.
    assert forecast_memory(SMALL, replace(third, reduce_bucket=6 * 10**8)).stays[BUCKETS] == 24 * 10**8
    assert forecast_memory(SMALL, replace(third, reduce_bucket=10**6)).stays[BUCKETS] == 4 * 10**6
    assert (
        forecast_memory(LARGE, replace(third, live_parameters=2 * 10**9)).at_most(PARAMETERS) == 2 * N // 8 + 4 * 10**9
    )
    forward = "the forward pass of the last layer"
    head = 152064 * 3584
    assert moments(LARGE, third)[forward].lines[BUCKETS] == 2 * (5 * 10**7 + head)
    assert moments(LARGE, replace(third, prefetch_bucket=10**7))[forward].lines[BUCKETS] == 2 * (10**7 + head)
    step = "the optimiser's step"
    assert moments(LARGE, third)[step].bytes == 4 * (N // 8)
    # The norm of an eighth of the embeddings in float64 is more than what so few elements take to update.
    assert moments(LARGE, replace(third, sub_group=10**8))[step].bytes == head
    assert moments(LARGE, replace(third, sub_group=5 * 10**8))[step].bytes == 20 * 10**8


def test_float32_gradients_of_a_parameter_across_two_shares_are_whole_on_both() -> None:
    embedding = 151936 * 896
    second = replace(ONE_GPU, bytes_per_weight=4, zero_stage=2)
    # The share in which the embeddings end holds layers too, and the embeddings of all the shares before it.
    for workers, shares in ((1, 1), (2, 1), (8, 3), (64, 18)):
        assert (shares - 1) * N_SMALL / workers < embedding
        held = forecast_memory(SMALL, replace(second, workers=workers)).stays[GRADIENTS]
        assert held == pytest.approx(4 * shares * N_SMALL / workers, abs=4), workers


def test_zero_copies_float32_weights_too() -> None:
    masters = [
        forecast_memory(SMALL, replace(ONE_GPU, bytes_per_weight=4, zero_stage=stage, workers=4)).stays[MASTERS]
        for stage in (1, 2, 3)
    ]
    assert masters == [N_SMALL, N_SMALL, N_SMALL]


def test_offload_moves_states_to_the_host_whole() -> None:
    layout = replace(ONE_GPU, zero_stage=3, workers=8)
    moved = forecast_memory(LARGE, replace(layout, offload_optimizer="cpu"))
    assert moved.stays.get(OPTIMIZER, 0) == moved.stays[MASTERS] == 0
    # Master, two moments, the sum of the gradients and the one that the optimiser reads: 4 + 8 + 4 + 4 bytes.
    assert moved.host == pytest.approx(20 * N, rel=1e-6)
    assert moved.stays[GRADIENTS] == 0
    more = forecast_memory(LARGE, replace(layout, offload_optimizer="cpu", offload_parameters="cpu"))
    assert more.host - moved.host == pytest.approx(2 * N, rel=1e-6)
    assert (more.stays[PARAMETERS], more.at_most(PARAMETERS)) == (0, 2 * 10**9)
    nvme = forecast_memory(LARGE, replace(layout, offload_optimizer="nvme"))
    assert nvme.nvme == pytest.approx(12 * N, rel=1e-6)


def test_adapters_train_rank_times_the_sides_of_every_matrix() -> None:
    sides = (896 + 896) + 2 * (896 + 128) + (896 + 896) + 2 * (896 + 4864) + (4864 + 896)
    layout = replace(ONE_GPU, lora=LoraLayout(16))
    assert trained_parameters(SMALL, layout) == 24 * 16 * sides
    assert forecast_memory(SMALL, layout).stays[GRADIENTS] == 4 * 24 * 16 * sides
    two = replace(ONE_GPU, lora=LoraLayout(8, ("q_proj", "v_proj")))
    assert trained_parameters(SMALL, two) == 24 * 8 * ((896 + 896) + (896 + 128))


def test_more_tokens_never_need_less() -> None:
    for checkpointing, width in itertools.product((False, True), (2, 4)):
        totals = [
            forecast_memory(
                SMALL,
                Layout(tokens, 512, bytes_per_weight=width, gradient_checkpointing=checkpointing),  # type: ignore[arg-type]
            ).total
            for tokens in (512, 1024, 2048, 8192, 32768)
        ]
        assert totals == sorted(totals)


def test_checkpointing_more_workers_and_higher_stages_never_need_more() -> None:
    assert forecast_memory(LARGE, replace(ONE_GPU, gradient_checkpointing=True)).total < (
        forecast_memory(LARGE, ONE_GPU).total
    )
    for stage in (1, 2, 3):
        totals = [
            forecast_memory(LARGE, replace(ONE_GPU, zero_stage=stage, workers=workers)).total  # type: ignore[arg-type]
            for workers in (2, 4, 8, 64)
        ]
        assert totals == sorted(totals, reverse=True)
    stages = [
        forecast_memory(LARGE, replace(ONE_GPU, zero_stage=stage, workers=8)).total  # type: ignore[arg-type]
        for stage in (0, 1, 2, 3)
    ]
    assert stages == sorted(stages, reverse=True)


def test_fewer_checkpointed_layers_need_more_and_checkpoints_on_the_host_are_counted_there() -> None:
    whole = replace(ONE_GPU, gradient_checkpointing=True)
    totals = [forecast_memory(LARGE, replace(whole, checkpoint_every=every)).total for every in (1, 2, 4, 27)]
    assert totals == sorted(totals)
    assert totals[-1] < forecast_memory(LARGE, ONE_GPU).total
    plain, *work = (
        forecast_step(LARGE, layout, global_pairs=1).flops
        for layout in (ONE_GPU, whole, replace(whole, checkpoint_every=2))
    )
    assert work[1] - plain == pytest.approx((work[0] - plain) * 14 / 27), "the last of 28 layers is kept"
    here, there = (forecast_memory(LARGE, replace(whole, offload_checkpoints=wanted)) for wanted in (False, True))
    assert there.host - here.host == here.at_most(ACTIVATIONS) - there.at_most(ACTIVATIONS) > 0


def test_a_peak_is_what_stays_and_its_moment() -> None:
    memory = forecast_memory(LARGE, ONE_GPU)
    assert memory.total == sum(memory.stays.values()) + max(moment.bytes for moment in memory.moments)
    for line in (*memory.stays, ACTIVATIONS, ATTENTION, HEAD):
        assert memory.at_peak(line) <= memory.at_most(line)


def test_checkpoints_hold_masters_and_moments() -> None:
    disk = forecast_disk(LARGE, ONE_GPU, keep_checkpoints=2)
    assert (disk.checkpoint, disk.most, disk.final) == (12 * N, 36 * N, 2 * N)
    adapters = replace(ONE_GPU, lora=LoraLayout(16))
    trained = trained_parameters(LARGE, adapters)
    disk = forecast_disk(LARGE, adapters, keep_checkpoints=1)
    assert (disk.checkpoint, disk.final) == (12 * trained, 2 * N + 4 * trained)


def test_a_step_is_six_operations_a_parameter_and_token_and_attention() -> None:
    # 64 pairs of 512 + 512 + 512 tokens; the embeddings are looked up, not multiplied with.
    work = forecast_step(LARGE, ONE_GPU, global_pairs=64)
    assert work.tokens == 64 * 1536
    feed_forward = 3 * 3584 * 18944
    multiplied = (28 * (2 * 3584 * 3584 + 2 * 3584 * 512) + 27 * feed_forward) * work.tokens
    # The head and of the last layer all but keys and values see responses only.
    scored = 64 * 1024
    multiplied += feed_forward * scored - 2 * 3584 * 3584 * (work.tokens - scored)
    pairs_of_positions = 64 * (1024 * 1024 / 2 + 512 * 512 + 512 * 512 / 2)
    layers = 2 * multiplied + 4 * 3584 * (28 * pairs_of_positions - 64 * 512 * 512 / 2)
    head = 2 * 152064 * 3584 * scored
    # Five pairs a row of 8,192 tokens.
    assert work.micro_batches == 13
    # A fourth time, as the backward pass computes logits again, but for 64 MiB of them in each micro-batch.
    kept = work.micro_batches * 2**24 // 152064
    assert work.flops == pytest.approx(3 * layers + (4 - kept / scored) * head)
    checkpointed = forecast_step(LARGE, replace(ONE_GPU, gradient_checkpointing=True), global_pairs=64)
    layer = 2 * (2 * 3584 * 3584 + 2 * 3584 * 512 + feed_forward) * work.tokens + 4 * 3584 * pairs_of_positions
    assert checkpointed.flops - work.flops == pytest.approx(27 * layer), "the last layer is never computed again"
    assert work.seconds(device_tflops=100, workers=2) == pytest.approx(work.flops / (2 * 0.4 * 100e12))
    assert work.seconds(device_tflops=100, workers=2, utilisation=0.2) == pytest.approx(work.flops / (0.4 * 100e12))


def test_adapters_spare_the_gradients_of_frozen_weights() -> None:
    whole = forecast_step(LARGE, ONE_GPU, global_pairs=64).flops
    adapted = forecast_step(LARGE, replace(ONE_GPU, lora=LoraLayout(16)), global_pairs=64).flops
    assert 2 / 3 < adapted / whole < 0.7


def test_every_worker_passes_over_its_share_of_the_pairs() -> None:
    # A row of 6,144 tokens holds four pairs of 1,536.
    layout = replace(ONE_GPU, tokens=6144, zero_stage=2, workers=8)
    assert forecast_step(LARGE, layout, global_pairs=64).micro_batches == 2
    assert forecast_step(LARGE, layout, global_pairs=65).micro_batches == 3
    assert forecast_step(LARGE, replace(layout, tokens=100), global_pairs=64).micro_batches == 8


def test_attention_and_scores_are_counted_pair_by_pair() -> None:
    batch = Batch.of([(3, 2, 4), (1, 1)])
    assert (batch.pairs, batch.tokens, batch.scored) == (2, 11, 7)
    # Triangles of 3 + 2 and of 4, which sees the prompt of 3 as well; then one of 1 + 1.
    assert batch.looked_at == 25 / 2 + 4 * 3 + 16 / 2 + 4 / 2
    assert batch.looked_at_in_prompts == 9 / 2 + 1 / 2


def test_the_forecast_knows_the_bound_of_the_head() -> None:
    from dpo_cli.policy import head

    assert (CHUNK_BYTES, CHUNK_TOKENS) == (head.CHUNK_BYTES, head.CHUNK_TOKENS)


def test_the_forecast_knows_the_engine_s_bucket() -> None:
    from dpo_cli.engine.zero_config import BUCKET_ELEMENTS

    assert REDUCE_BUCKET == BUCKET_ELEMENTS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "longest"), [(1, 256), (3, 256), (2, 2048)])
def test_activations_are_what_autograd_keeps(
    dtype: str, layers: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.batch.layout import pack
    from dpo_cli.data.example import Example
    from dpo_cli.policy import products
    from dpo_cli.policy.packed_model import PackedModel

    # On every processor what torch's own kernels for bfloat16 keep: attention in float32 keeps a little less.
    monkeypatch.setattr(products, "_has_bfloat16", lambda: True)
    torch.manual_seed(0)
    sizes = QWEN2_HALF_BILLION | {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": layers, "num_attention_heads": 4,
        "vocab_size": 512,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen2", **{key: value for key, value in sizes.items() if key != "model_type"}),
        attn_implementation="packed",
        dtype=getattr(torch, dtype),
    ).train()
    half = longest // 2
    random = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return random.integers(0, 512, count).astype(np.int32)

    count = max(2, 2048 // longest)
    row = pack([Example(prompt=ids(half), responses=(ids(half + 1), ids(half + 1))) for _ in range(count)])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PackedModel(model)(row)
    autograd = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)

    planned = Row.of_pairs(len(row.input_ids), longest, on_gpu=False)
    layout = Layout(planned.tokens, longest, bytes_per_weight=4 if dtype == "float32" else 2, on_gpu=False)
    memory = forecast_memory(ModelShape.of(sizes), layout, replace(planned, scored=len(row.targets)))
    forward = memory.moments[0]
    forecast = forward.lines[ACTIVATIONS] + forward.lines[ATTENTION]
    assert forecast == pytest.approx(autograd, rel=0.03)
