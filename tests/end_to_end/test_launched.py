"""Runs whose processes dpo-train starts by itself, or torchrun and deepspeed start for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Finished, Workplace
from .test_resume import run_until

ONE_WORKER = ["hardware=deepspeed_zero3", "hardware.device=cpu", "hardware.num_workers=1"]
BIN = Path(sys.executable).parent


def under(workplace: Workplace, launcher: str, *words: str, timeout: float = 60) -> Finished:
    """`dpo-train` as two ranks of a launcher."""
    commands = {
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "-m", "dpo_cli"],
        "deepspeed": [BIN / "deepspeed", "--num_gpus=2", "--module", "dpo_cli"],
    }
    done = subprocess.run(
        [*commands[launcher], *words], cwd=workplace.folder, env={**workplace.environment, "DS_ACCELERATOR": "cpu"},
        timeout=timeout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


def exit_codes(run: Path) -> list[int]:
    return [json.loads(file.read_text())["exit_code"] for file in sorted((run / "ranks").glob("rank-*.json"))]


def test_help_and_the_configuration_start_no_workers(workplace: Workplace) -> None:
    shown = workplace.train("--cfg", "job", *ONE_WORKER, "run_dir=shown")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "zero_stage: 3" in shown.stdout
    assert not (workplace.folder / "shown").exists()


@pytest.mark.slow
def test_a_worker_that_dpo_train_starts_trains_to_the_end(workplace: Workplace) -> None:
    done = workplace.shell(*workplace.defaults, *ONE_WORKER, "max_steps=2", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "done in" in done.stdout
    assert exit_codes(workplace.folder / "run") == [0]
    assert (workplace.folder / "run" / "final").is_dir()


@pytest.mark.slow
def test_a_launched_run_that_is_stopped_goes_on_where_it_was(workplace: Workplace) -> None:
    process = workplace.start(*workplace.defaults, *ONE_WORKER, "max_steps=200", "log_every=1", "run_dir=run")
    run_until(process, "train step 3/")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert output.count("dpo-train resume=run") == 1
    process = workplace.start("resume=run")
    run_until(process, "resumed after step")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75


@pytest.mark.slow
def test_bad_data_found_by_a_worker_is_told_once_and_exits_with_2(workplace: Workplace) -> None:
    (workplace.folder / "pairs.jsonl").write_text('{"prompt": 7}\n')
    done = workplace.shell(*workplace.defaults, *ONE_WORKER, "run_dir=run")
    assert done.returncode == 2
    assert done.stderr.startswith("dpo-train: ")
    assert "Traceback" not in done.stderr
    # Nothing was computed yet, and the name stays free.
    assert not (workplace.folder / "run").exists()


@pytest.mark.slow
def test_a_sweep_starts_its_jobs_workers_one_after_the_other(workplace: Workplace) -> None:
    done = workplace.shell(
        "-m",
        *workplace.defaults,
        *ONE_WORKER,
        "max_steps=1",
        "loss.beta=0.1,0.2",
        "run_dir=sweep",
        "sweep.report=false",
    )
    assert done.returncode == 0, done.stderr
    assert [exit_codes(workplace.folder / "sweep" / job) for job in ("0", "1")] == [[0], [0]]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hardware=deepspeed_zero3", "loss.bta=1"], "did you mean beta?"),
        (["hardware=deepspeed_zero3", "--config-dir"], "The command line cannot be read"),
        (["hardware=single_gpu"], "hardware=single_gpu trains in one process, and the launcher has started 2."),
        (["hardware=deepspeed_zero3", "-m", "loss.beta=1,2"], "-m starts several runs"),
    ],
)
def test_bad_input_under_a_launcher_is_told_once_and_leaves_no_folder(
    workplace: Workplace, launcher: str, words: list[str], message: str
) -> None:
    done = under(workplace, launcher, *workplace.defaults, "run_dir=run", *words)
    assert done.returncode != 0
    assert done.stderr.count(message) == 1
    assert done.stderr.count("dpo-train: ") == 1
    assert not (workplace.folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_help_under_a_launcher_is_printed_once(workplace: Workplace, launcher: str) -> None:
    done = under(workplace, launcher, "--help")
    assert done.returncode == 0
    assert done.stdout.count("from preference data to a trained policy") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_plan_under_a_launcher_is_told_once_and_ends_all_ranks(workplace: Workplace, launcher: str) -> None:
    words = ["hardware=deepspeed_zero3", "hardware.device=cpu", "plan=true", "run_dir=run"]
    done = under(workplace, launcher, *workplace.defaults, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layout: ZeRO stage 3, 2 workers") == 1
    assert not (workplace.folder / "run").exists()
