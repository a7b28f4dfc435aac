"""The same runs on a GPU: bf16 by default, float32 like the CPU, resumable bit for bit when deterministic."""

from __future__ import annotations

import math
import signal

import pytest

from .conftest import Workplace, assert_same_weights
from .test_resume import run_until

pytestmark = pytest.mark.gpu
LN2 = math.log(2)


def test_a_bf16_run_starts_at_ln_2_and_learns(workplace: Workplace) -> None:
    done = workplace.train("run_dir=run", "max_steps=40", "eval_every=0")
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout
    first, last = workplace.metrics("run", "eval")
    assert first["loss"] == pytest.approx(LN2, abs=2e-2)
    assert last["rewards/accuracies"] > 0.9


def test_float32_on_the_gpu_follows_the_cpu(workplace: Workplace) -> None:
    for device in ("cpu", "cuda"):
        done = workplace.train(f"hardware.device={device}", "model.dtype=float32", f"run_dir={device}")
        assert done.returncode == 0, done.stderr
    for one, other in zip(workplace.metrics("cpu", "eval"), workplace.metrics("cuda", "eval"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)


def test_a_deterministic_run_resumes_bit_for_bit(workplace: Workplace) -> None:
    settings = ["deterministic=true", "max_steps=60", "save_every=2"]
    straight = workplace.shell(*workplace.defaults, *settings, "run_dir=straight")
    assert straight.returncode == 0, straight.stderr
    process = workplace.start(*workplace.defaults, *settings, "run_dir=killed")
    run_until(process, "train step 10/")
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = workplace.shell("resume=killed")
    assert done.returncode == 0, done.stderr
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("killed"))
