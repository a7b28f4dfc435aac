"""Jobs of a sweep on a cluster, or in processes of their own on this machine, through submitit"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.atomic import write_json
from dpo_cli.cli.sweep.jobs import Job
from dpo_cli.config.schema import SweepConfig

# Scripts, logs and results of submitit, and the ids of what was submitted.
_FOLDER = "cluster"
_IDS_FILE = "ids.json"
_POLL_SECONDS = 1.0
# How often a job may run out of time and be queued again; each time it has come further.
_TIMES_OUT_OF_TIME = 100
# A job that vanished without an exit code: its node, its time or its memory is gone.
_EXIT_LOST = 1


class TrainJob:
    """What a cluster runs: dpo-train in the job's folder, from wherever the run stands.

    When the cluster takes the machine back, or the time is up, the run saves and the job is queued again.
    """

    def __init__(self, folder: str, cwd: str) -> None:
        self.folder = folder
        self.cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        command = [sys.executable, "-m", "dpo_cli", f"resume={self.folder}"]
        # The notice that time is up goes to every process of a job; this one speaks to the run in a way it knows.
        self._process = subprocess.Popen(command, cwd=self.cwd, preexec_fn=_ignore_notice)
        return self._ended(self._process)

    def checkpoint(self) -> Any:
        import submitit

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._ended(self._process)
        return submitit.helpers.DelayedSubmission(TrainJob(self.folder, self.cwd))

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> int:
        # Popen.wait holds a lock that a signal's handler, which waits as well, could not take.
        while (code := process.poll()) is None:
            time.sleep(0.2)
        return code


def _ignore_notice() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Cluster:
    """Submits jobs, and waits for them; one that was submitted before and is not done is waited for, not repeated."""

    def __init__(self, settings: SweepConfig, folder: Path) -> None:
        import submitit

        self._folder = folder.absolute()
        self._at_work: dict[str, tuple[Job, Any]] = {}
        self._executor = submitit.AutoExecutor(
            folder=self._folder / _FOLDER, cluster=settings.cluster, slurm_max_num_timeout=_TIMES_OUT_OF_TIME
        )
        parameters: dict[str, Any] = {"name": folder.name, "timeout_min": settings.minutes, "nodes": 1}
        if settings.gpus is not None:
            parameters["gpus_per_node"] = settings.gpus
        if settings.cluster == "slurm":
            parameters["slurm_additional_parameters"] = dict(settings.options)
            if settings.partition is not None:
                parameters["slurm_partition"] = settings.partition
            if settings.parallel is not None:
                parameters["slurm_array_parallelism"] = settings.parallel
        self._executor.update_parameters(**parameters)

    def start(self, jobs: Sequence[Job]) -> None:
        """Submit jobs, several of them as one array; their folders are there."""
        fresh = []
        for job in jobs:
            earlier = self._earlier(job)
            if earlier is None:
                fresh.append(job)
            else:
                self._at_work[earlier.job_id] = (job, earlier)
        with self._executor.batch():
            submitted = [
                self._executor.submit(TrainJob(str(self._folder / str(job.number)), str(Path.cwd()))) for job in fresh
            ]
        ids = self._ids()
        for job, handle in zip(fresh, submitted, strict=True):
            print(f"#{job.number}: job {handle.job_id}, log {handle.paths.stdout}", flush=True)
            self._at_work[handle.job_id] = (job, handle)
            ids[str(job.number)] = handle.job_id
        write_json(self._folder / _FOLDER / _IDS_FILE, ids)

    def ended(self) -> Iterator[tuple[Job, int]]:
        """Wait for the next jobs to end: each with its exit code."""
        while True:
            done = [name for name, (_, handle) in self._at_work.items() if handle.done()]
            for name in done:
                job, handle = self._at_work.pop(name)
                yield job, self._code(handle)
            if done or not self._at_work:
                return
            time.sleep(_POLL_SECONDS)

    @property
    def names(self) -> list[str]:
        """Of jobs that are at work or queued, as the cluster knows them."""
        return list(self._at_work)

    def _earlier(self, job: Job) -> Any:
        """What was submitted for this job before, where the cluster still has it."""
        name = self._ids().get(str(job.number))
        if name is None or self._executor.cluster != "slurm":
            return None
        handle = self._executor._executor.job_class(self._folder / _FOLDER, name)
        return None if handle.done(force_check=True) else handle

    def _ids(self) -> dict[str, str]:
        file = self._folder / _FOLDER / _IDS_FILE
        return dict(json.loads(file.read_bytes())) if file.exists() else {}

    @staticmethod
    def _code(handle: Any) -> int:
        try:
            return int(handle.result())
        except Exception as error:
            # submitit raises a class of its own for every way in which a job can be lost.
            print(f"job {handle.job_id} is lost: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            return _EXIT_LOST
