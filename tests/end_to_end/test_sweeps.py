"""Sweeps as their users see them: searched, run in processes of their own, stopped and gone on with, compared."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.cli.run_folder import create_run_folder
from dpo_cli.cli.sweep.cluster import TrainJob
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose

from .conftest import Workplace, save_tiny_model

SHORT = ["max_steps=2", "eval_every=0", "save_every=0", "logger=[]", "run_dir=sweep", "sweep.report=false"]


def swept(workplace: Workplace) -> list[dict[str, Any]]:
    compared = json.loads((workplace.folder / "sweep" / "sweep.json").read_text())
    return list(compared["jobs"])


def margin_of(workplace: Workplace, job: int) -> float:
    value: float = workplace.metrics(f"sweep/{job}", "eval")[-1]["rewards/margins"]
    return value


def test_a_sweep_ends_with_a_table_of_what_differs_best_first(workplace: Workplace) -> None:
    done = workplace.train("-m", *SHORT, "optimizer.lr=1e-3,3e-3", "loss.beta=0.1", "sweep.metric=eval/rewards/margins")
    assert done.returncode == 0, done.stderr
    jobs = swept(workplace)
    assert [job["job"] for job in jobs] == [1, 0]
    assert [job["overrides"] for job in jobs] == [{"optimizer.lr": "0.003"}, {"optimizer.lr": "0.001"}]
    margins = [job["results"]["eval/rewards/margins"] for job in jobs]
    assert margins == [margin_of(workplace, 1), margin_of(workplace, 0)]
    with (workplace.folder / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["optimizer.lr"], row["state"]) for row in rows] == [
        ("1", "0.003", "finished"),
        ("0", "0.001", "finished"),
    ]
    assert "best eval/rewards/margins first" in done.stdout
    assert "loss.beta" not in done.stdout.partition("best eval")[2]


def test_a_search_aims_at_its_metric_and_goes_on_where_it_was_stopped(workplace: Workplace) -> None:
    pytest.importorskip("optuna", reason='needs Optuna: pip install "dpo-cli[optuna]"')
    search = ["sweep.sampler=tpe", "sweep.metric=eval/rewards/margins", "sweep.trials=2"]
    ranges = ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "loss.beta=choice(0.1,0.2)", "loss.label_smoothing=0"]
    done = workplace.train("-m", *SHORT, *search, *ranges)
    assert done.returncode == 0, done.stderr
    before = {job["job"]: job["overrides"] for job in swept(workplace)}
    assert sorted(before) == [0, 1]
    assert all(1e-4 <= float(values["optimizer.lr"]) <= 1e-2 for values in before.values())
    assert {values["loss.beta"] for values in before.values()} <= {"0.1", "0.2"}

    import optuna

    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(workplace.folder / "sweep" / "study.log"))
    )
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [trial.value for trial in study.trials] == [margin_of(workplace, number) for number in range(2)]

    # What a kill leaves that comes while a trial's values are drawn.
    study.ask()
    more = workplace.call("resume=sweep", "sweep.trials=4")
    assert more.returncode == 0, more.stderr
    assert more.stdout.count("\n#") == 1, "finished jobs are left alone"
    after = {job["job"]: job["overrides"] for job in swept(workplace)}
    assert after.items() >= before.items() and sorted(after) == [0, 1, 3]
    assert after[3] not in before.values(), "a seed that began anew would draw the same values"
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]


def test_trials_that_fail_or_end_early_are_told_to_the_study_as_such(workplace: Workplace) -> None:
    optuna = pytest.importorskip("optuna", reason='needs Optuna: pip install "dpo-cli[optuna]"')
    save_tiny_model(workplace.folder / "other", seed=1, initializer_range=0.3)
    words = ["sweep.sampler=random", "sweep.trials=3", "seed=33", "sweep.metric=eval/loss", "sweep.direction=minimize"]
    # Of another model as reference the run ends early; of a learning rate without measure, it is not finite.
    search = ["model.reference=start,other", "optimizer.lr=1e-3,1e30", "optimizer.max_grad_norm=null"]
    done = workplace.train("-m", *SHORT, *words, *search, "health.stop_on=[reference_mismatch]")
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(
        study_name="sweep",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(workplace.folder / "sweep" / "study.log"))
        ),
    )
    states = {job["job"]: job["state"] for job in swept(workplace)}
    told = {"finished": "COMPLETE", "ended early": "PRUNED", "not finite": "FAIL"}
    assert [trial.state.name for trial in study.trials] == [told[states[number]] for number in range(3)]
    assert set(states.values()) == set(told)


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_with_the_jobs_that_are_left(workplace: Workplace) -> None:
    shorter = [word for word in SHORT if not word.startswith("max_steps")]
    done = workplace.train("-m", *shorter, "max_steps=1,2,3", "optimizer.lr=1e30", "optimizer.max_grad_norm=null")
    assert done.returncode == 3
    assert "dpo-train resume=sweep/1" in done.stderr and "dpo-train resume=sweep\n" in done.stderr
    first = (workplace.folder / "sweep" / "0" / "metrics.jsonl").read_bytes()
    refused = workplace.call("resume=sweep", "loss.beta=0.3")
    assert refused.returncode == 2 and "only sweep.* may change" in refused.stderr
    again = workplace.call("resume=sweep")
    assert again.returncode == 3, again.stderr
    assert "\n#1 of 3" in again.stdout and "\n#0" not in again.stdout
    assert (workplace.folder / "sweep" / "0" / "metrics.jsonl").read_bytes() == first


@pytest.mark.slow
def test_jobs_in_processes_of_their_own_run_side_by_side_and_are_compared(workplace: Workplace) -> None:
    pytest.importorskip("submitit", reason='needs submitit: pip install "dpo-cli[slurm]"')
    words = ["sweep.cluster=local", "sweep.parallel=2", "sweep.metric=eval/rewards/margins"]
    done = workplace.shell("-m", *workplace.defaults, *SHORT, *words, "optimizer.lr=1e-3,3e-3")
    assert done.returncode == 0, done.stderr
    assert [(job["job"], job["state"]) for job in swept(workplace)] == [(1, "finished"), (0, "finished")]
    assert done.stdout.count("log ") == 2
    logs = list((workplace.folder / "sweep" / "cluster").glob("*_0_log.out"))
    assert len([log for log in logs if "done in" in log.read_text()]) == 2
    again = workplace.call("resume=sweep", "sweep.cluster=null", "sweep.parallel=null")
    assert again.returncode == 0, again.stderr
    assert "#0 of" not in again.stdout


@pytest.mark.slow
def test_a_job_that_must_leave_saves_and_goes_on(workplace: Workplace) -> None:
    pytest.importorskip("submitit", reason='needs submitit: pip install "dpo-cli[slurm]"')
    from submitit import AutoExecutor

    long = ["max_steps=4000", "eval_every=0", "save_every=0", "log_every=1", "logger=[]", "run_dir=run"]
    request = Request((*workplace.defaults, *long))
    with chdir(workplace.folder):
        create_run_folder(check(compose(request)), request)
    metrics = workplace.folder / "run" / "metrics.jsonl"
    executor = AutoExecutor(workplace.folder / "jobs", cluster="local")
    executor.update_parameters(timeout_min=60)
    job = executor.submit(TrainJob(str(workplace.folder / "run"), str(workplace.folder)))
    wait_for(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 3)
    # As SLURM does it: the notice goes to every process of the job.
    (submitted,) = children_of(job._process.pid)
    (training,) = children_of(submitted)
    for process in (training, submitted):
        os.kill(process, signal.SIGUSR2)
    try:
        wait_for(lambda: "resumed after step" in job.paths.stdout.read_text())
    finally:
        for submitted in children_of(job._process.pid):
            for training in children_of(submitted):
                os.kill(training, signal.SIGTERM)
    assert job.result() == 75


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
