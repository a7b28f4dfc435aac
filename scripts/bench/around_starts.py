"""Commands that are started and watched: until they end, or until the first step that they log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from bench_report import Run, environment_of, run_fresh
from trl_run import TrlRun

EXAMPLE = Path(__file__).resolve().parents[2] / "dpo_cli" / "example"
# One epoch of 3,964 pairs is scored before the first step of 32.
EPOCH_PAIRS = 3964
_QUIET = ("data.eval=null", "eval.task.problems=null", "logger=[]", "log_every=1", "eval_every=0")


@dataclass
class Starts:
    """scratch: a folder for all runs, their stores and caches. pairs: of a step."""

    scratch: Path
    threads: int
    pairs: int

    def help(self) -> Run:
        return self._ended(["dpo-train", "--help"], code=0)

    def config_error(self) -> Run:
        return self._ended(["dpo-train", "los=dpo", "loss.beta=-1"], code=2)

    def imports(self) -> Run:
        """What no start can do without: the library, and a model's class."""
        return self._ended(["python", "-c", "import torch; from transformers import Qwen2ForCausalLM"], code=0)

    def ours_cold(self) -> Run:
        shutil.rmtree(self.scratch / "store", ignore_errors=True)
        return self._first_step(["save_every=0"], self._new("run"))

    def ours_warm(self) -> Run:
        if not (self.scratch / "store").exists():
            self.ours_cold()
        return self._first_step(["save_every=0"], self._new("run"))

    def ours_resumed(self) -> Run:
        """From the second step's checkpoint of a run that was killed after its third step."""
        stopped, copy = self.scratch / "stopped", self._new("resumed")
        if not stopped.exists():
            self._first_step(["save_every=1"], stopped, step=3)
        shutil.copytree(stopped, copy)
        # What is there of later steps would be taken for the resumed run's.
        saved = max(int(path.name.removeprefix("step-")) for path in (copy / "checkpoints").glob("step-????????"))
        log = copy / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= saved), encoding="utf-8")
        return self._until_step(["dpo-train", f"resume={copy}"], copy, saved + 1)

    def trl_cold(self) -> Run:
        shutil.rmtree(self.scratch / "cache", ignore_errors=True)
        return self._trl(end_after=1)

    def trl_warm(self) -> Run:
        if not (self.scratch / "cache").exists():
            self.trl_cold()
        return self._trl(end_after=1)

    def trl_resumed(self) -> Run:
        stopped = self.scratch / "trl-stopped"
        if not stopped.exists():
            self._trl(end_after=3, save_every=1, folder=str(stopped))
        return self._trl(end_after=1, resume=str(stopped / "checkpoint-2"))

    def step_of_ranks(self, words: tuple[str, ...]) -> Run:
        """The median step of a model that is worth sharing out, each process with one thread."""
        run = self._new("ranks")
        words = (*words, f"model.path={self._larger_model()}", "optimizer.warmup_steps=1", "save_every=0")
        self._ended(self._training(words, run, steps=10, pairs=2 * self.pairs), code=0, threads=1)
        lines = _logged(run)
        tokens = [line["num_tokens"] for line in lines]
        speeds = [line["perf/tokens_per_second"] for line in lines]
        # The first steps warm up.
        seconds = [(tokens[at] - tokens[at - 1]) / speeds[at] for at in range(3, len(lines))]
        return {"seconds": statistics.median(seconds)}

    def _first_step(self, words: Sequence[str], run: Path, *, step: int = 1) -> Run:
        return self._until_step(
            self._training(words, run, steps=EPOCH_PAIRS // self.pairs, pairs=self.pairs), run, step
        )

    def _training(self, words: Sequence[str], run: Path, *, steps: int, pairs: int) -> list[str]:
        ours = (f"run_dir={run}", f"store_dir={self.scratch / 'store'}", f"max_steps={steps}", f"global_pairs={pairs}")
        return ["dpo-train", *_QUIET, *ours, *words]

    def _ended(self, words: Sequence[str], *, code: int, threads: int | None = None) -> Run:
        """Seconds until a command has ended by itself."""
        with self._started(words, threads) as process:
            began = time.perf_counter()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - began
        if process.returncode != code:
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {self._log.read_text()}")
        return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}

    def _until_step(self, words: Sequence[str], run: Path, step: int) -> Run:
        """Seconds until a step is logged; the run is killed then."""
        with self._started(words, None) as process:
            began = time.perf_counter()
            while process.poll() is None and not any(line["step"] >= step for line in _logged(run)):
                time.sleep(0.005)
            seconds = time.perf_counter() - began
            if process.returncode is not None:
                raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {self._log.read_text()}")
            process.send_signal(signal.SIGKILL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}

    @contextmanager
    def _started(self, words: Sequence[str], threads: int | None) -> Iterator[subprocess.Popen[bytes]]:
        program, *rest = words
        command = [str(Path(sys.executable).with_name(program)), *rest]
        with self._log.open("wb") as log:
            process = subprocess.Popen(command, env=environment_of(threads or self.threads), stdout=log, stderr=log)
            try:
                yield process
            finally:
                if process.returncode is None:
                    process.kill()
                    process.wait()

    @property
    def _log(self) -> Path:
        """What the command that was started last has said."""
        return self.scratch / "said.txt"

    def _trl(self, **settings: Any) -> Run:
        """Seconds until its first step has ended."""
        run = TrlRun(
            model=str(EXAMPLE / "base"), data=str(EXAMPLE / "pairs.jsonl"), folder=str(self._new("trl")),
            steps=EPOCH_PAIRS // self.pairs, pairs=self.pairs, learning_rate=2e-4, beta=3.0,
        )  # fmt: skip
        file = self.scratch / "trl.json"
        file.write_text(json.dumps(asdict(replace(run, **settings))), encoding="utf-8")
        told = run_fresh("trl_run.py", str(file), threads=self.threads, HF_DATASETS_CACHE=str(self.scratch / "cache"))
        seconds, cpu_seconds = told["ends"][0]
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def _new(self, name: str) -> Path:
        """A folder that is not there yet."""
        return next(path for number in count() if not (path := self.scratch / f"{name}-{number}").exists())

    def _larger_model(self) -> Path:
        """Random weights in the embedded example's architecture and with its tokenizer."""
        folder = self.scratch / "larger"
        if not folder.exists():
            run_fresh("larger_model.py", str(EXAMPLE / "base"), str(folder), threads=self.threads)
        return folder


def _logged(run: Path) -> list[dict[str, Any]]:
    """The whole lines of training metrics so far."""
    log = run / "metrics.jsonl"
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and '"split": "train"' in line]
