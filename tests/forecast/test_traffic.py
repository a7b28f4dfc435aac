"""What workers exchange in a step: the formulas, and every byte that two ranks give to collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forecast_shapes import QWEN2_SEVEN_BILLION

from dpo_cli.forecast.layout import Layout, LoraLayout
from dpo_cli.forecast.memory import trained_parameters
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.forecast.traffic import Traffic, forecast_traffic, forward_traffic

REPOSITORY = Path(__file__).parents[2]
LARGE = ModelShape.of(QWEN2_SEVEN_BILLION)
N = 7_615_616_512
ZERO = Layout(tokens=8192, longest=2048, bytes_per_weight=2, zero_stage=3, workers=8)


def traffic(layout: Layout, micro_batches: int = 4) -> Traffic:
    return forecast_traffic(LARGE, layout, micro_batches=micro_batches)


def test_whole_copies_and_stage_1_exchange_once_a_step() -> None:
    assert traffic(replace(ZERO, zero_stage=0)) == Traffic(4 * N, 4 * N)
    assert traffic(replace(ZERO, zero_stage=1)) == Traffic(4 * N + 2 * N, 4 * N)


def test_stage_2_sums_in_every_micro_batch_and_gathers_new_weights_once() -> None:
    assert traffic(replace(ZERO, zero_stage=2)) == Traffic(4 * 4 * N + 2 * N, 4 * 4 * N)


def test_stage_3_gathers_twice_in_every_micro_batch_but_for_the_end_of_the_model() -> None:
    assert traffic(ZERO) == Traffic(4 * 2 * (2 * N - 500_000_000), 4 * 4 * N)
    assert traffic(replace(ZERO, reuse_distance=2 * N)).gathered == 4 * 2 * N
    assert traffic(replace(ZERO, reuse_distance=0)).gathered == 4 * 2 * 2 * N


def test_layers_that_are_computed_again_and_too_large_to_be_kept_are_gathered_three_times() -> None:
    checkpointed = replace(ZERO, gradient_checkpointing=True)
    assert traffic(checkpointed).gathered == pytest.approx(4 * 2 * (2 * N - 333_333_333), rel=1e-8)
    # The last of 28 is not computed again.
    assert traffic(replace(checkpointed, reuse_distance=0)).gathered == 4 * 2 * (2 * N + 27 * LARGE.layer_parameters)


def test_adapters_exchange_little_but_all_weights_are_gathered() -> None:
    adapters = replace(ZERO, lora=LoraLayout(16), reuse_distance=0)
    trained = trained_parameters(LARGE, adapters)
    assert traffic(adapters) == Traffic(4 * 2 * (2 * N + 4 * trained), 4 * 4 * trained)
    assert traffic(replace(adapters, zero_stage=2)) == Traffic(4 * 4 * trained + 2 * trained, 4 * 4 * trained)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_one_worker_has_nobody_to_exchange_with(stage: Any) -> None:
    assert traffic(replace(ZERO, zero_stage=stage, workers=1)) == Traffic(0, 0)
    assert forward_traffic(LARGE, replace(ZERO, zero_stage=stage, workers=1)) == Traffic(0, 0)


def test_only_partitioned_weights_are_gathered_to_score() -> None:
    assert forward_traffic(LARGE, ZERO) == Traffic(2 * N, 0)
    assert forward_traffic(LARGE, replace(ZERO, zero_stage=2)) == Traffic(0, 0)


def test_each_worker_sends_all_but_its_own_share() -> None:
    assert Traffic(800, 160).sent(8) == 840


@pytest.mark.slow
def test_two_ranks_exchange_what_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "bench"))
    from traffic import CASES

    command = [sys.executable, str(REPOSITORY / "scripts/bench/traffic.py"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    counted = {name: Traffic(**found) for name, found in json.loads(done.stdout).items()}
    assert counted.keys() == CASES.keys()
    for name, found in counted.items():
        forecast = CASES[name].forecast
        if name.startswith("ZeRO-3, one layer kept"):
            assert forecast.reduced == found.reduced
            assert 1 <= forecast.gathered / found.gathered < 1.1, name
        else:
            assert forecast == found, name
