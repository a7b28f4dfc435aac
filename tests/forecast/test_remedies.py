"""What is proposed really fits, and is what a user can type."""

from __future__ import annotations

from dataclasses import replace

import pytest
from forecast_shapes import QWEN2_HALF_BILLION, QWEN2_SEVEN_BILLION

from dpo_cli.forecast.layout import Layout, LoraLayout
from dpo_cli.forecast.memory import GIB, forecast_memory
from dpo_cli.forecast.remedies import USABLE_SHARE, Remedy, remedies
from dpo_cli.forecast.shape import ModelShape

SMALL, LARGE = ModelShape.of(QWEN2_HALF_BILLION), ModelShape.of(QWEN2_SEVEN_BILLION)
GROUPS = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "single_gpu")
ONE_GPU = Layout(tokens=16384, longest=1024, bytes_per_weight=2)


def laid_out(layout: Layout, remedy: Remedy) -> Layout:
    """The layout that the words of a remedy ask for."""
    for word in remedy.words:
        key, _, value = word.partition("=")
        match key:
            case "tokens_per_microbatch":
                layout = replace(layout, tokens=int(value))
            case "model.gradient_checkpointing":
                layout = replace(layout, gradient_checkpointing=value == "true")
            case "hardware":
                layout = replace(layout, zero_stage=int(value.removeprefix("deepspeed_zero")))  # type: ignore[arg-type]
            case "hardware.num_workers":
                layout = replace(layout, workers=int(value))
            case "hardware.offload_optimizer":
                layout = replace(layout, offload_optimizer=value)  # type: ignore[arg-type]
            case "hardware.offload_parameters":
                layout = replace(layout, offload_parameters=value)  # type: ignore[arg-type]
            case "model.lora.rank":
                layout = replace(layout, lora=LoraLayout(int(value)))
            case _:
                raise AssertionError(f"an unknown word: {word}")
    return layout


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("device_gib", [12, 24, 40, 80])
def test_every_proposal_fits_and_says_all_it_changes(shape: ModelShape, workers: int, device_gib: int) -> None:
    layout = replace(ONE_GPU, zero_stage=0 if workers > 1 else None, workers=workers)
    for remedy in remedies(shape, layout, device_bytes=device_gib * GIB, zero_groups=GROUPS):
        assert laid_out(layout, remedy) == remedy.layout
        again = forecast_memory(shape, remedy.layout)
        assert again.total == remedy.memory.total <= USABLE_SHARE * device_gib * GIB
        assert len({word.partition("=")[0] for word in remedy.words}) == len(remedy.words)


def test_they_come_cheapest_in_speed_first() -> None:
    layout = replace(ONE_GPU, zero_stage=0, workers=8)
    names = [remedy.name for remedy in remedies(LARGE, layout, device_bytes=80 * GIB, zero_groups=GROUPS)]
    assert names == ["a higher ZeRO stage", "more workers", "offload to the host", "low-rank adapters"]
    names = [remedy.name for remedy in remedies(SMALL, ONE_GPU, device_bytes=24 * GIB)]
    assert names == ["fewer tokens at once", "gradient checkpointing", "low-rank adapters"]


def test_what_is_enough_alone_is_proposed_alone() -> None:
    found = {remedy.name: remedy for remedy in remedies(SMALL, ONE_GPU, device_bytes=24 * GIB)}
    assert found["gradient checkpointing"].words == ("model.gradient_checkpointing=true",)
    (word,) = found["fewer tokens at once"].words
    tokens = int(word.partition("=")[2])
    # The largest of its halvings that fits.
    assert forecast_memory(SMALL, replace(ONE_GPU, tokens=2 * tokens)).total > USABLE_SHARE * 24 * GIB


def test_no_more_workers_are_proposed_than_will_do() -> None:
    found = {r.name: r for r in remedies(LARGE, ONE_GPU, device_bytes=80 * GIB, zero_groups=GROUPS)}
    workers = found["more workers"].layout.workers
    least = replace(ONE_GPU, tokens=1536, gradient_checkpointing=True, zero_stage=3, workers=workers // 2)
    assert workers > 1
    assert forecast_memory(LARGE, least).total > USABLE_SHARE * 80 * GIB


def test_nothing_is_proposed_that_this_installation_cannot_do() -> None:
    for remedy in remedies(LARGE, ONE_GPU, device_bytes=80 * GIB, zero_groups=("single_gpu",)):
        assert not any(word.startswith("hardware") for word in remedy.words)


def test_a_device_that_is_too_small_for_anything_gets_no_proposal() -> None:
    assert remedies(LARGE, ONE_GPU, device_bytes=2 * GIB, zero_groups=()) == []
