"""TR-DPO from the shell: every so many steps training starts from its own policy again."""

from __future__ import annotations

import math
import signal

import pytest

from .conftest import Workplace, assert_same_weights
from .test_distributed import ZERO, assert_close_runs, finish
from .test_resume import run_until

LN2 = math.log(2)


def test_the_step_after_a_change_has_the_loss_of_a_policy_that_is_its_reference(workplace: Workplace) -> None:
    done = workplace.train("model.reference_sync_steps=4", "max_steps=10", "log_every=1", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "replaced by the policy every 4 steps" in done.stdout
    assert done.stdout.count("reference: the policy after step") == 2
    for row in workplace.metrics("run", "train"):
        # Steps are counted from 1 here: the fifth and the ninth are the first of their reference.
        if row["step"] in (1, 5, 9):
            assert row["loss"] == pytest.approx(LN2, abs=1e-6)
            assert row["rewards/margins"] == pytest.approx(0, abs=1e-6)
        else:
            assert abs(row["loss"] - LN2) > 1e-4
    # Held-out pairs are compared with the start, all the way.
    first, *_, last = workplace.metrics("run", "eval")
    assert first["loss"] == pytest.approx(LN2, abs=1e-5) and last["rewards/margins"] > 0.01
    assert "replaced by the policy every 4 steps" in (workplace.folder / "run" / "final" / "README.md").read_text()


def test_until_its_first_change_it_is_the_run_without(workplace: Workplace) -> None:
    brief = ("max_steps=4", "eval_every=0", "save_every=0")
    assert workplace.train(*brief, "run_dir=still").returncode == 0
    assert workplace.train(*brief, "model.reference_sync_steps=4", "run_dir=moving").returncode == 0
    assert_same_weights(workplace.final_weights("still"), workplace.final_weights("moving"))


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ended_between_changes_goes_on_bit_for_bit(workplace: Workplace, ended: signal.Signals) -> None:
    moving = [
        "model.reference_sync_steps=7",
        "max_steps=30",
        "save_every=3",
        "eval_every=0",
        "tokens_per_microbatch=64",
    ]
    assert workplace.train(*moving, "run_dir=straight").returncode == 0
    process = workplace.start(*workplace.defaults, *moving, "run_dir=ended")
    run_until(process, "train step 16/")
    process.send_signal(ended)
    process.communicate(timeout=60)
    resumed = workplace.call("resume=ended")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("ended"))


def test_two_ranks_move_it_as_one_process_does(workplace: Workplace) -> None:
    moving = ["model.reference_sync_steps=3", "eval_every=0", "save_every=0"]
    assert workplace.train(*moving, "run_dir=one").returncode == 0
    code, output = finish(workplace, *workplace.defaults, *ZERO, *moving, "run_dir=two")
    assert code == 0, output
    assert_close_runs(workplace, "one", "two")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss=simpo"], "this loss has no reference to move"),
        (["loss=pdpo", "data.generator_fraction=0.2"], "scores samples with a reference that stands still"),
    ],
)
def test_a_loss_that_it_means_nothing_to_is_refused(workplace: Workplace, words: list[str], said: str) -> None:
    done = workplace.train(*words, "model.reference_sync_steps=4", "run_dir=run")
    assert done.returncode == 2
    assert said in done.stderr and "model.reference_sync_steps=null" in done.stderr
