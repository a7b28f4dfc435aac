"""A finding ends a run that names it: with a checkpoint, a final model and an exit code of its own, on all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import Workplace, assert_same_weights, save_tiny_model

pytestmark = pytest.mark.timeout(600)

# Another random model is no reference for this one: found before the first step.
STOPPING = ["model.reference=other", "health.stop_on=[reference_mismatch]"]


@pytest.fixture
def mismatched(workplace: Workplace) -> Workplace:
    save_tiny_model(workplace.folder / "other", seed=1, initializer_range=0.3)
    return workplace


def health_of(workplace: Workplace, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workplace.folder / run / "health.jsonl").read_text().splitlines()]


def checkpoints(workplace: Workplace, run: str) -> list[str]:
    return sorted(path.name for path in (workplace.folder / run / "checkpoints").iterdir())


def test_the_run_ends_after_the_next_step_with_everything_written(mismatched: Workplace) -> None:
    done = mismatched.train(*STOPPING, "run_dir=run")
    assert done.returncode == 4, done.stderr
    assert "warning  step 0  reference_mismatch" in done.stdout
    assert "Ended after step 1" in done.stderr and "resume=run health.stop_on=[]" in done.stderr
    assert [(row["step"], row["name"]) for row in health_of(mismatched, "run")] == [(0, "reference_mismatch")]
    assert checkpoints(mismatched, "run") == ["step-00000001"]
    assert mismatched.metrics("run", "eval")[-1]["step"] == 1
    assert mismatched.final_weights("run")


def test_resuming_says_the_same_again_and_without_the_stop_goes_on_to_the_weights_of_a_whole_run(
    mismatched: Workplace,
) -> None:
    assert mismatched.train("model.reference=other", "run_dir=straight").returncode == 0
    assert mismatched.train(*STOPPING, "run_dir=run").returncode == 4
    ended = mismatched.final_weights("run")
    assert mismatched.call("resume=run").returncode == 4

    # Killed between the checkpoint and the final model.
    shutil.rmtree(mismatched.folder / "run" / "final")
    again = mismatched.call("resume=run")
    assert again.returncode == 4, again.stderr
    assert_same_weights(mismatched.final_weights("run"), ended)
    assert checkpoints(mismatched, "run") == ["step-00000001"]

    went_on = mismatched.call("resume=run", "health.stop_on=[]")
    assert went_on.returncode == 0, went_on.stderr
    assert_same_weights(mismatched.final_weights("run"), mismatched.final_weights("straight"))
    assert (mismatched.folder / "run" / "final-step-00000001").is_dir()
    assert health_of(mismatched, "run") == health_of(mismatched, "straight")


def test_a_sweep_goes_on_with_the_job_after_one_that_was_ended(mismatched: Workplace) -> None:
    done = mismatched.call(
        "-m", *mismatched.defaults, *STOPPING, "loss.beta=0.1,0.2", "run_dir=sweep", "sweep.report=false"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Ended after step 1") == 2
    assert all((mismatched.folder / "sweep" / job / "final").is_dir() for job in "01")


def test_nothing_is_looked_for_where_it_is_switched_off(mismatched: Workplace) -> None:
    done = mismatched.train("model.reference=other", "health.enabled=false", "max_steps=2", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "reference_mismatch" not in done.stdout
    assert not (Path(mismatched.folder) / "run" / "health.jsonl").exists()


@pytest.mark.parametrize("hardware", ["deepspeed_zero1"])
def test_two_ranks_end_after_the_same_step(mismatched: Workplace, hardware: str) -> None:
    words = [f"hardware={hardware}", "hardware.device=cpu", "hardware.num_workers=2"]
    done = mismatched.shell(*mismatched.defaults, *STOPPING, *words, "run_dir=run")
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("Ended after step 1") == 1
    assert checkpoints(mismatched, "run") == ["step-00000001"]
    resumed = mismatched.shell("resume=run")
    assert resumed.returncode == 4, resumed.stderr
