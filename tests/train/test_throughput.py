"""What a training makes of its device, from clocks and counters."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from dpo_cli.forecast.cost import Batch, needed_flops
from dpo_cli.forecast.peaks import peak_tflops, utilisation_pct
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.train.throughput import Clock, Utilisation, memory_gib

QWEN2_05B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip


def test_utilisation_is_what_the_model_needs_of_what_the_devices_could_do() -> None:
    # 1e4 tokens/s x 6e9 operations = 6e13 a second, of two devices that could do 1e14 each.
    measured = utilisation_pct(tokens_per_second=1e4, flops_per_token=6e9, device_tflops=100, devices=2)
    assert measured == pytest.approx(30.0)


def test_a_token_needs_six_operations_a_weight_and_four_where_weights_are_frozen() -> None:
    """Kaplan et al., arXiv:2001.08361: 6 N; here without attention's quadratic part, negligible for short rows."""
    shape = ModelShape.of(QWEN2_05B)
    # Without a prompt every token is scored, so the head and the last layer count for all of them.
    batch = Batch.of([(0, 16, 16)] * 8)
    assert needed_flops(shape, batch, adapters=False) / batch.tokens == pytest.approx(
        6 * shape.active_parameters, rel=0.01
    )
    assert needed_flops(shape, batch, adapters=True) * 3 == pytest.approx(
        2 * needed_flops(shape, batch, adapters=False)
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121),
     ("NVIDIA RTX A4000", None), ("NVIDIA RTX A1000", None), ("Some GPU", None)],
)  # fmt: skip
def test_peaks_go_by_whole_words_and_unknown_devices_have_none(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_the_clock_tells_speed_memory_and_where_it_is_known_utilisation() -> None:
    cpu = torch.device("cpu")
    assert Utilisation.of(None, cpu, Batch.of([(1, 1, 1)])) is None
    clock = Clock(cpu, Utilisation(flops_per_token=2e9, device_tflops=1, devices=1))
    held = np.ones(2**24)  # 128 MiB
    time.sleep(0.02)
    clock.step_done(1000)
    told = clock.read()
    assert told["perf/mfu_pct"] == pytest.approx(100 * told["perf/tokens_per_second"] * 2e9 / 1e12)
    assert told["perf/memory_gib"] > held.nbytes / 2**30
    assert "perf/mfu_pct" not in Clock(cpu, None).read()
    assert memory_gib(cpu) is not None
