"""Two ranks train what one process trains, resume bit for bit, and lose nothing whichever of them dies when."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.engine.processes import command_of, with_environment

from .conftest import DPO_TRAIN, Workplace, assert_same_weights
from .test_launched import under
from .test_resume import run_until

pytestmark = pytest.mark.timeout(900)

ZERO = ["hardware=deepspeed_zero3", "hardware.device=cpu", "hardware.num_workers=2"]
FAULTS = Path(__file__).parent / "faults"
MARK = "DPO_TEST_RUN"


def start(workplace: Workplace, *words: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """A run and the mark by which its processes are found again."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [DPO_TRAIN, *words], cwd=workplace.folder, env={**workplace.environment, MARK: mark, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return process, mark


def finish(workplace: Workplace, *words: str, **environment: str) -> tuple[int, str]:
    process, mark = start(workplace, *words, **environment)
    output, _ = process.communicate(timeout=600)
    assert_no_orphans(mark)
    return process.returncode, output


def assert_no_orphans(mark: str, *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while left := with_environment(MARK, mark):
        assert time.monotonic() < deadline, [command_of(one.pid) for one in left]
        time.sleep(0.1)


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def assert_close_runs(workplace: Workplace, first: str, second: str) -> None:
    """The same metrics and weights up to the rounding of sums."""
    rows = [comparable(workplace.metrics(run)) for run in (first, second)]
    assert [(row["step"], row["split"]) for row in rows[0]] == [(row["step"], row["split"]) for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens", "grad_norm"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), (name, one["step"])
    one, other = workplace.final_weights(first), workplace.final_weights(second)
    assert one.keys() == other.keys()
    assert max(float((tensor - other[name]).abs().max()) for name, tensor in one.items()) < 1e-4


def forget_after(workplace: Workplace, run: str, step: int) -> None:
    """Put a run back to the checkpoint of an earlier step."""
    folder = workplace.folder / run
    shutil.rmtree(folder / "final")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def test_two_ranks_train_what_one_process_trains_and_one_process_can_go_on(workplace: Workplace) -> None:
    assert workplace.train("run_dir=one", "store_dir=store_one").returncode == 0
    code, output = finish(workplace, *workplace.defaults, *ZERO, "run_dir=two")
    assert code == 0, output
    assert "2 ranks" in output
    assert_close_runs(workplace, "one", "two")
    forget_after(workplace, "two", 8)
    resumed = workplace.call("resume=two", "hardware=single_gpu", "hardware.num_workers=null")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step 8" in resumed.stdout
    assert_close_runs(workplace, "one", "two")


def test_a_mix_that_couples_the_batch_and_asks_for_statistics_trains_the_same_on_two_ranks(
    workplace: Workplace,
) -> None:
    parts = "{loss: dpo, weight: 1, use_weighting: true}, {loss: aot, weight: 0.5}, {loss: bco_pair, weight: 0.2}"
    mix = ["loss=mix", f"loss.losses=[{parts}]", "eval_every=0", "save_every=0"]
    assert workplace.train(*mix, "run_dir=one").returncode == 0
    code, output = finish(workplace, *workplace.defaults, *ZERO, *mix, "run_dir=two")
    assert code == 0, output
    assert_close_runs(workplace, "one", "two")
    assert {"loss/dpo", "loss/aot", "loss/bco_pair"} <= workplace.metrics("two", "train")[0].keys()


def test_two_ranks_stopped_by_a_signal_go_on_bit_for_bit(workplace: Workplace) -> None:
    long = ["max_steps=40", "save_every=0", "eval_every=0"]
    code, output = finish(workplace, *workplace.defaults, *ZERO, *long, "run_dir=straight")
    assert code == 0, output
    process, mark = start(workplace, *workplace.defaults, *ZERO, *long, "run_dir=stopped")
    run_until(process, "train step 4/")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert_no_orphans(mark)
    code, output = finish(workplace, "resume=stopped")
    assert code == 0, output
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("stopped"))
    assert comparable(workplace.metrics("straight")) == comparable(workplace.metrics("stopped"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["hardware=single_gpu"], ZERO),
        (["hardware=deepspeed_zero1", "hardware.num_workers=2"], ZERO),
        (ZERO, ["hardware=deepspeed_zero2", "hardware.num_workers=1"]),
        (ZERO, ["hardware=deepspeed_zero3_offload", "hardware.num_workers=3"]),
        (["hardware=deepspeed_zero1", "hardware.zero_stage=0", "hardware.num_workers=2"], ["hardware=single_gpu"]),
    ],
    ids=["one to zero3", "zero1 to zero3", "zero3 to one rank of zero2", "two to three ranks", "replicated to one"],
)
def test_any_layout_goes_on_where_any_other_stopped(workplace: Workplace, first: list[str], then: list[str]) -> None:
    assert workplace.train("run_dir=one", "store_dir=store_one").returncode == 0
    code, output = finish(workplace, *workplace.defaults, *first, "hardware.device=cpu", "run_dir=other")
    assert code == 0, output
    forget_after(workplace, "other", 8)
    workers = [] if any("num_workers" in word for word in then) else ["hardware.num_workers=null"]
    code, output = finish(workplace, "resume=other", *then, *workers)
    assert code == 0, output
    assert "resumed after step 8" in output
    assert_close_runs(workplace, "one", "other")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ranks_that_another_launcher_has_started_train_the_same(workplace: Workplace, launcher: str) -> None:
    assert workplace.train("run_dir=one", "store_dir=store_one").returncode == 0
    done = under(workplace, launcher, *workplace.defaults, "hardware=deepspeed_zero3", "run_dir=two", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout
    assert_close_runs(workplace, "one", "two")


@pytest.mark.slow
def test_lora_on_partitioned_weights_exports_what_one_process_exports(workplace: Workplace) -> None:
    lora = ["model.lora.rank=4"]
    assert workplace.train(*lora, "run_dir=one", "store_dir=store_one").returncode == 0
    code, output = finish(workplace, *workplace.defaults, *ZERO, *lora, "run_dir=two")
    assert code == 0, output
    assert_close_runs(workplace, "one", "two")
    assert (workplace.folder / "two" / "final" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ranks_and_launchers_killed_at_random_moments_lose_nothing(workplace: Workplace) -> None:
    kills, long = 10, ["max_steps=300", "save_every=2", "eval_every=50", "tokens_per_microbatch=64"]
    code, output = finish(workplace, *workplace.defaults, *ZERO, *long, "run_dir=straight", "store_dir=store_straight")
    assert code == 0, output
    rng = random.Random(0)
    words = [*workplace.defaults, *ZERO, *long, "run_dir=killed", "store_dir=store_killed"]
    for kill in range(kills):
        process, mark = start(workplace, *words)
        words = ["resume=killed"]
        run_until(process, "device:")
        time.sleep(rng.uniform(0.0, 3.0 if kill < 4 else 5.0))
        assert process.poll() is None, f"the run was over before kill {kill + 1}"
        rng.choice([kill_command, kill_launcher, kill_rank])(process, mark, rng)
        process.communicate(timeout=120)
        assert process.returncode != 0
        assert_no_orphans(mark)
    code, output = finish(workplace, "resume=killed")
    assert code == 0, output
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("killed"))
    assert comparable(workplace.metrics("straight")) == comparable(workplace.metrics("killed"))


def kill_command(process: subprocess.Popen[str], mark: str, rng: random.Random) -> None:
    process.kill()


def kill_launcher(process: subprocess.Popen[str], mark: str, rng: random.Random) -> None:
    kill_one(process, mark, "dpo_cli.engine.torchrun", rng)


def kill_rank(process: subprocess.Popen[str], mark: str, rng: random.Random) -> None:
    kill_one(process, mark, "dpo_cli.cli.worker", rng, without="dpo_cli.engine.torchrun")


def kill_one(
    process: subprocess.Popen[str], mark: str, word: str, rng: random.Random, *, without: str = "(nothing)"
) -> None:
    found = [one.pid for one in with_environment(MARK, mark) if one.pid != process.pid]
    chosen = [pid for pid in found if word in (line := " ".join(command_of(pid))) and without not in line]
    os.kill(rng.choice(sorted(chosen)), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_rank_that_dies_in_any_phase_of_a_save_loses_nothing(workplace: Workplace) -> None:
    """One run, killed in one phase after another, each time at its first or second save after it went on."""
    phases = [
        (rank, phase)
        for phase in ("save", "_write_share", "_write_part", "_forget_cached", "describe")
        for rank in (0, 1)
    ]
    phases += [(0, phase) for phase in ("_begin", "_finish", "_write_synced", "_publish", "_prune", "_remove")]
    long = [f"max_steps={4 * len(phases)}", "save_every=2", "eval_every=0", "keep_checkpoints=2"]
    code, output = finish(workplace, *workplace.defaults, *ZERO, *long, "run_dir=straight")
    assert code == 0, output
    words = [*workplace.defaults, *ZERO, *long, "run_dir=killed"]
    for number, (rank, phase) in enumerate(phases):
        environment = {"FAULT": f"{rank}:{phase}:{number % 2}", "PYTHONPATH": str(FAULTS)}
        code, output = finish(workplace, *words, **environment)
        assert code != 0, f"rank {rank} was to die in {phase}: {output}"
        assert "signal 9" in output or "SIGKILL" in output, output
        assert "damaged" not in output
        words = ["resume=killed"]
    code, output = finish(workplace, *words)
    assert code == 0, output
    assert "damaged" not in output
    assert_same_weights(workplace.final_weights("straight"), workplace.final_weights("killed"))
    assert comparable(workplace.metrics("straight")) == comparable(workplace.metrics("killed"))


@pytest.mark.slow
def test_a_full_disk_of_one_rank_ends_the_save_on_all_with_the_last_checkpoint_intact(
    workplace: Workplace, small_disk: Path
) -> None:
    """The disk fills when the second checkpoint is written."""
    words = ["max_steps=60", "save_every=4", "eval_every=0", f"run_dir={small_disk / 'run'}"]
    process, mark = start(workplace, *workplace.defaults, *ZERO, *words)
    run_until(process, "train step 6/")
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(small_disk)
        file.write(b"\0" * max(0, free.f_bavail * free.f_frsize - 60_000))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "the disk is full" in output
    assert_no_orphans(mark)
    filler.unlink()
    code, output = finish(workplace, f"resume={small_disk / 'run'}")
    assert code == 0, output
    assert "resumed after step" in output
    assert torch.isfinite(
        torch.tensor([row["loss"] for row in workplace.metrics(str(small_disk / "run"), "train")])
    ).all()
