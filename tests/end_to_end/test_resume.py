"""Whatever ends a run, resuming it gives the weights of a run that was never interrupted, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import time

import pytest
import torch

from .conftest import Workplace, assert_same_weights, echo_pairs, write_jsonl

# Long enough to be killed in, with many small scoring batches and a checkpoint every other step.
LONG = ["max_steps=60", "save_every=2", "eval_every=10", "tokens_per_microbatch=64"]


def run_until(process: subprocess.Popen[str], text: str) -> str:
    """Read the output up to a line that holds `text`."""
    seen = []
    assert process.stdout is not None
    for line in process.stdout:
        seen.append(line)
        if text in line:
            return "".join(seen)
    raise AssertionError(f"{text!r} never came: {''.join(seen)}")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(workplace: Workplace, kills: int) -> None:
    # A life of a run takes at most some forty steps before it is killed; it must not be over before the last kill.
    long = [*LONG, f"max_steps={60 * kills}"]
    straight = workplace.train(*long, "run_dir=straight", "store_dir=store_straight")
    assert straight.returncode == 0, straight.stderr
    process = workplace.start(*workplace.defaults, *long, "run_dir=killed", "store_dir=store_killed")
    rng = random.Random(kills)
    for kill in range(kills):
        run_until(process, "device:")
        # Reading data and scoring take the second after this line, steps and saves come then: some of both are hit.
        time.sleep(rng.uniform(0.0, 1.5 if kill < kills // 3 else 3.0))
        assert process.poll() is None, f"the run was over before kill {kill + 1}"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = workplace.start("resume=killed")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("killed"))
    comparable = [
        [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in workplace.metrics(run)]
        for run in ("straight", "killed")
    ]
    assert comparable[0] == comparable[1]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_says_how_to_go_on(workplace: Workplace, sent: signal.Signals) -> None:
    assert workplace.train(*LONG, "run_dir=straight").returncode == 0
    process = workplace.start(*workplace.defaults, *LONG, "save_every=0", "run_dir=stopped")
    run_until(process, "train step 4/")
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "resume=stopped" in output
    assert len(list((workplace.folder / "stopped" / "checkpoints").iterdir())) == 1
    resumed = workplace.call("resume=stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("stopped"))


@pytest.mark.parametrize("moment", ["device:", "reference model:", "step 0:", "eval  step 60/60"])
def test_a_signal_at_any_stage_leaves_a_run_that_resumes_to_the_same_weights(workplace: Workplace, moment: str) -> None:
    """While data are read, while the reference is scored, before the first step, while the final model is written."""
    assert workplace.train(*LONG, "run_dir=straight", "store_dir=store_straight").returncode == 0
    process = workplace.start(*workplace.defaults, *LONG, "run_dir=stopped")
    run_until(process, moment)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    # A signal in the last moments may come too late to stop anything.
    assert process.returncode == 75 or (moment.startswith("eval") and process.returncode == 0), output
    assert "Traceback" not in output
    resumed = workplace.call("resume=stopped/")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("stopped"))


def test_a_second_ctrl_c_exits_at_once_and_loses_only_what_was_not_saved(workplace: Workplace) -> None:
    slow = ["global_pairs=96", "max_steps=30", "tokens_per_microbatch=64", "log_every=1", "save_every=4"]
    assert workplace.train(*slow, "run_dir=straight").returncode == 0
    process = workplace.start(*workplace.defaults, *slow, "run_dir=stopped")
    run_until(process, "train step 6/")
    process.send_signal(signal.SIGINT)
    run_until(process, "a second Ctrl-C leaves at once")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    resumed = workplace.call("resume=stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("stopped"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(workplace: Workplace) -> None:
    assert workplace.train("run_dir=straight").returncode == 0
    process = workplace.start(*workplace.defaults, "run_dir=run")
    run_until(process, "train step 10/")
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = sorted((workplace.folder / "run" / "checkpoints").glob("step-*"))[-1]
    weights = newest / "policy-00000-00000.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    done = workplace.call("resume=run")
    assert done.returncode == 0, done.stderr
    assert newest.name in done.stdout
    assert "damaged" in done.stdout
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("run"))


def test_another_experiment_is_refused_and_shown_as_a_difference(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run").returncode == 0
    refused = workplace.call("resume=run", "loss.beta=0.7")
    assert refused.returncode == 2
    assert "loss.beta" in refused.stderr
    assert "0.7" in refused.stderr
    assert "0.1" in refused.stderr


def test_changed_data_are_refused_on_resuming(workplace: Workplace) -> None:
    process = workplace.start(*workplace.defaults, "run_dir=run")
    run_until(process, "train step 4/")
    process.send_signal(signal.SIGKILL)
    process.wait()
    write_jsonl(workplace.folder / "pairs.jsonl", echo_pairs(96, seed=5))
    refused = workplace.call("resume=run")
    assert refused.returncode == 2
    assert "data" in refused.stderr
    assert "not what this run began with" in refused.stderr


def test_a_complete_run_says_so_when_resumed(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run", "max_steps=1").returncode == 0
    again = workplace.call("resume=run")
    assert again.returncode == 0
    assert "complete" in again.stdout


def test_a_constant_schedule_can_be_prolonged_and_equals_a_longer_run(workplace: Workplace) -> None:
    """The longer run sees rows whose references the shorter one never needed."""
    constant = ["optimizer.schedule=constant", "eval_every=0", "save_every=0"]
    assert workplace.train(*constant, "max_steps=9", "run_dir=long").returncode == 0
    assert workplace.train(*constant, "max_steps=3", "run_dir=short").returncode == 0
    done = workplace.call("resume=short", "max_steps=9")
    assert done.returncode == 0, done.stderr
    long, short = workplace.final_weights("long"), workplace.final_weights("short")
    for name, tensor in long.items():
        torch.testing.assert_close(short[name], tensor, rtol=1e-4, atol=1e-5)
    assert (workplace.folder / "short" / "final-step-00000003" / "model.safetensors").exists()


def test_what_does_not_change_the_experiment_may_change_on_resuming(workplace: Workplace) -> None:
    process = workplace.start(*workplace.defaults, *LONG, "run_dir=run")
    run_until(process, "train step 8/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    done = workplace.call("resume=run", "keep_checkpoints=1", "logger=[]")
    assert done.returncode == 0, done.stderr
    assert len(list((workplace.folder / "run" / "checkpoints").iterdir())) == 1
