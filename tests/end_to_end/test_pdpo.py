"""PDPO as a user runs it: on-policy samples in training, killed, resumed, spread over ranks, and fed bad prompts."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.train.metrics_log import read_metrics

from .conftest import Workplace, assert_same_weights, echo_pairs, save_tiny_model, write_jsonl
from .test_distributed import ZERO, assert_close_runs, comparable, finish, forget_after
from .test_resume import run_until

# Of a random model's samples of up to forty words, some end and some do not.
PDPO = ["loss=pdpo", "loss.gamma=0.5", "rollout.prompts_per_step=4", "rollout.max_new_tokens=40"]
OWN_PROMPTS = [*PDPO, "data.generator=truths.jsonl", "data.generator_fraction=0"]


@pytest.fixture
def pdpo(workplace: Workplace) -> Workplace:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in echo_pairs(20, seed=2)]
    write_jsonl(workplace.folder / "truths.jsonl", rows)
    return workplace


def samples(workplace: Workplace, run: str) -> list[dict[str, Any]]:
    return list(read_metrics(workplace.folder / run / "samples.jsonl"))


def trained(workplace: Workplace, run: str) -> dict[str, Any]:
    """The last line of training metrics."""
    return workplace.metrics(run, "train")[-1]


def test_at_gamma_zero_it_is_dpo_on_the_same_pairs_bit_for_bit_and_nothing_is_sampled(pdpo: Workplace) -> None:
    assert pdpo.train("run_dir=dpo").returncode == 0
    done = pdpo.train(*OWN_PROMPTS, "loss.gamma=0", "run_dir=zero")
    assert done.returncode == 0, done.stderr
    assert_same_weights(pdpo.final_weights("dpo"), pdpo.final_weights("zero"))
    assert not (pdpo.folder / "zero" / "samples.jsonl").exists()
    own = [
        {name: value for name, value in row.items() if name != "loss/dpo"} for row in comparable(pdpo.metrics("zero"))
    ]
    assert own == comparable(pdpo.metrics("dpo"))


@pytest.mark.parametrize("generator", ["hinge", "unhinged", "policy_gradient"])
def test_every_generator_learns_from_fresh_samples_and_tells_what_it_saw(pdpo: Workplace, generator: str) -> None:
    own = ["rollout.samples_per_prompt=3", "loss.baseline=leave_one_out", f"loss.generator={generator}"]
    done = pdpo.train(*PDPO, *own, "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "drawn from the policy as it is at that step" in done.stdout
    last = trained(pdpo, "run")
    assert {"loss/dpo", "loss/generator", "generator/active_fraction", "generator/reward_gap"} <= last.keys()
    assert last["loss"] == pytest.approx(last["loss/dpo"] + 0.5 * last["loss/generator"], rel=0.2)
    assert last["generator/staleness"] == 0
    assert 0 < last["generator/eos_rate"] < 1
    assert last["perf/sampling_pct"] > 0
    shown = samples(pdpo, "run")
    assert [row["step"] for row in shown] == [step for step in range(1, 13) for _ in range(2)]
    assert all(len(row["samples"]) == 3 for row in shown)
    assert pdpo.train(*PDPO, *own, "loss.gamma=0", "run_dir=zero").returncode == 0
    moved, zero = pdpo.final_weights("run"), pdpo.final_weights("zero")
    assert any(not moved[name].equal(tensor) for name, tensor in zero.items())


def test_the_generators_prompts_are_not_the_discriminators(pdpo: Workplace) -> None:
    done = pdpo.train(*PDPO, "data.generator_fraction=0.25", "run_dir=run", "max_steps=9")
    assert done.returncode == 0, done.stderr
    assert "generator: 24 of the training rows; the other 72 discriminate" in done.stdout
    rows = {f"pairs.jsonl row {number}" for number in range(1, 97)}
    answered = {row["origin"] for row in samples(pdpo, "run")}
    assert answered < rows
    # 16 pairs a step: an epoch of the discriminator has 5 steps, whatever the generator does.
    assert trained(pdpo, "run")["epoch"] == pytest.approx(9 / 5)


@pytest.mark.parametrize(("refresh", "kills"), [(3, 3), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_with_the_same_weights_and_samples(
    pdpo: Workplace, refresh: int, kills: int
) -> None:
    long = [
        *OWN_PROMPTS,
        f"rollout.refresh_every={refresh}",
        "save_every=2",
        "eval_every=10",
        f"max_steps={60 * kills}",
    ]
    straight = pdpo.train(*long, "run_dir=straight", "store_dir=store_straight")
    assert straight.returncode == 0, straight.stderr
    process = pdpo.start(*pdpo.defaults, *long, "run_dir=killed", "store_dir=store_killed")
    rng = random.Random(kills)
    for _ in range(kills):
        # Just before the checkpoint is restored, or the first step is taken.
        run_until(process, "reference of samples:")
        time.sleep(rng.uniform(0.2, 1.8))
        assert process.poll() is None, "the run was over before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = pdpo.start("resume=killed")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert_same_weights(pdpo.final_weights("straight"), pdpo.final_weights("killed"))
    assert comparable(pdpo.metrics("straight")) == comparable(pdpo.metrics("killed"))
    assert samples(pdpo, "straight") == samples(pdpo, "killed")


@pytest.mark.parametrize(
    "own",
    [
        [],
        pytest.param(["model.lora.rank=4", "rollout.samples_per_prompt=3"], marks=pytest.mark.slow),
        pytest.param(["rollout.refresh_every=4", "tokens_per_microbatch=128"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_two_ranks_with_partitioned_weights_learn_what_one_process_learns(pdpo: Workplace, own: list[str]) -> None:
    words = [*OWN_PROMPTS, *own]
    done = pdpo.train(*words, "run_dir=one", "store_dir=store_one")
    assert done.returncode == 0, done.stderr
    code, output = finish(pdpo, *pdpo.defaults, *words, *ZERO, "run_dir=two")
    assert code == 0, output
    assert samples(pdpo, "one") == samples(pdpo, "two")
    assert_close_runs(pdpo, "one", "two")
    # Two ranks drew what waits in this checkpoint; one process goes on with it.
    forget_after(pdpo, "two", 8)
    resumed = pdpo.call("resume=two", "hardware=single_gpu", "hardware.num_workers=null")
    assert resumed.returncode == 0, resumed.stderr
    assert samples(pdpo, "one") == samples(pdpo, "two")
    assert_close_runs(pdpo, "one", "two")


def test_under_lora_the_reference_is_the_policy_without_its_adapters(pdpo: Workplace) -> None:
    done = pdpo.train(*PDPO, "model.lora.rank=4", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "reference of samples:" in done.stdout
    assert trained(pdpo, "run")["generator/reward_gap"] != 0


def test_another_reference_model_scores_the_samples_as_well(pdpo: Workplace) -> None:
    other = save_tiny_model(pdpo.folder / "other", seed=9)
    done = pdpo.train(*PDPO, f"model.reference={other}", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "reference of samples:" in done.stdout


def test_a_prompt_without_a_ground_truth_is_named(pdpo: Workplace) -> None:
    path = pdpo.folder / "truths.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[6]["completion"]
    write_jsonl(path, rows)
    done = pdpo.train(*OWN_PROMPTS, "run_dir=run")
    assert done.returncode == 2
    assert "truths.jsonl row 7" in done.stderr


def test_prompts_that_leave_no_room_for_a_sample_are_counted_or_end_the_run(pdpo: Workplace) -> None:
    words = " ".join(f"w{number % 40}" for number in range(50))
    rows = [json.loads(line) for line in (pdpo.folder / "truths.jsonl").read_text().splitlines()]
    rows[3]["prompt"] = f"echo : {words}"
    write_jsonl(pdpo.folder / "truths.jsonl", rows)
    done = pdpo.train(*OWN_PROMPTS, "rollout.max_new_tokens=100", "run_dir=some")
    assert done.returncode == 0, done.stderr
    assert "1 prompts are left out" in done.stdout and "truths.jsonl row 4" in done.stdout
    done = pdpo.train(*OWN_PROMPTS, "rollout.max_new_tokens=127", "run_dir=none")
    assert done.returncode == 2
    assert "rollout.max_new_tokens" in done.stderr


def test_a_policy_that_never_ends_its_samples_is_counted_and_trains_on_the_pairs(pdpo: Workplace) -> None:
    done = pdpo.train(*PDPO, "rollout.max_new_tokens=1", "max_steps=4", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert trained(pdpo, "run")["generator/eos_rate"] < 0.2
    assert (
        pdpo.train(*PDPO, "rollout.max_new_tokens=1", "rollout.keep_cut=true", "max_steps=4", "run_dir=cut").returncode
        == 0
    )
    assert "loss/generator" in trained(pdpo, "cut")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss=pdpo", "data.generator_fraction=0"], "data.generator_fraction=0.2"),
        (["loss=pdpo", "data.generator=truths.jsonl"], "data.generator_fraction"),
        (["loss=dpo", "data.generator_fraction=0.2"], "loss=pdpo"),
        (["loss=pdpo", "data.generator=truth.jsonl", "data.generator_fraction=0"], "did you mean truths.jsonl"),
        (["loss=pdpo", "loss.generator=hing"], "hinge, unhinged, policy_gradient"),
        (["loss=pdpo", "loss.generator=policy_gradient", "loss.baseline=leave_one_out"], "rollout.samples_per_prompt"),
        (["loss=pdpo", "rollout.temperature=0"], "greater than 0"),
        (["loss=pdpo", "rollout.temprature=0.5"], "did you mean temperature"),
        (["loss=pdpo", "loss.gamma=-1"], "at least 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_anything_starts(
    pdpo: Workplace, words: list[str], message: str
) -> None:
    done = pdpo.train(*words, "run_dir=run")
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path(pdpo.folder / "run").exists()


def test_samples_that_are_not_the_policys_own_are_called_off_policy(pdpo: Workplace) -> None:
    done = pdpo.train(*PDPO, "rollout.refresh_every=4", "rollout.temperature=0.7", "max_steps=4", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "off-policy: up to 3 steps old and not drawn from the policy's own distribution" in done.stdout
