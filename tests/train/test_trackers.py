"""Every tracker holds what metrics.jsonl holds, however often the run was killed; none can harm the run."""

from __future__ import annotations

import csv
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.schema import Config
from dpo_cli.errors import ConfigError, DpoError, Interrupted
from dpo_cli.health.curves import Finding, Severity
from dpo_cli.health.monitor import Told
from dpo_cli.tracking.tracker import Ending, RunFacts, Tracker
from dpo_cli.tracking.trackers import Trackers
from dpo_cli.train.metrics_log import MetricsLog, read_metrics

TOLD = Told("chosen_falling", Finding(Severity.WARNING, "it falls", "so it is", ("loss.beta=1",)), 2, "eval")


def configured(run_dir: Path, *loggers: str, words: tuple[str, ...] = ()) -> Config:
    return check(compose(Request((f"logger=[{','.join(loggers)}]", f"run_dir={run_dir}", *words))))


def record(config: Config, steps: range, value: float, *, failure: DpoError | None = None) -> list[str]:
    """What a run does that starts, or goes on, before the first of `steps`; returns what it said."""
    run_dir, said = Path(config.run_dir), []
    run_dir.mkdir(exist_ok=True)
    after = steps.start - 1 if steps.start else 0
    with MetricsLog(run_dir / "metrics.jsonl") as metrics:
        metrics.truncate_after(after if steps.start else -1)
        try:
            with Trackers.of(config, run_dir) as trackers:
                trackers.begin(after, said.append)
                for step in steps:
                    row = {"loss": value, "num_tokens": 7 * step, "rewards/margins": step / 3, "epoch": step / 10}
                    if step > 3:
                        row["perf/late"] = 1.0
                    for split in ("train", "eval") if step % 2 == 0 else ("train",):
                        metrics.append(step, split, row)
                        trackers.log(step, split, row | {"odd": math.nan})
                trackers.finding(TOLD)
                trackers.flush()
                if failure:
                    raise failure
                trackers.results(steps[-1], {"eval/loss": value})
        except DpoError:
            pass
    return said


def expected(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Of every metric: its steps and values, as metrics.jsonl has them."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run_dir / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "split"):
                curves.setdefault(f"{row['split']}/{name}", []).append((row["step"], value))
    return curves


def killed_and_resumed(config: Config, *, again: float) -> list[str]:
    """Steps 0 to 5, a stop, then from 4 on: what a resumed run repeats has the same values unless `again` differs."""
    said = record(config, range(6), 1.0, failure=Interrupted("stopped"))
    return said + record(config, range(4, 9), again)


@pytest.mark.parametrize(("start", "again"), [(4, 2.0), (0, 2.0)], ids=["after step 3", "before its first checkpoint"])
def test_tensorboard_supersedes_what_came_after_the_checkpoint(tmp_path: Path, start: int, again: float) -> None:
    config = configured(tmp_path / "run", "tensorboard")
    folder = tmp_path / "run" / "tensorboard"
    record(config, range(6), 1.0)
    # Event files are read in the order of their names, which begin with the second they were made in.
    first = next(folder.iterdir())
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))
    record(config, range(start, 9), again)
    events = EventAccumulator(str(folder))
    events.Reload()
    for name, curve in expected(tmp_path / "run").items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in curve
        ]
    assert events.Scalars("final/eval/loss")[-1].value == again
    assert {"config/text_summary", "health/chosen_falling/text_summary"} <= set(events.Tags()["tensors"])


def test_the_table_is_metrics_jsonl_with_columns_that_keep_their_places(tmp_path: Path) -> None:
    config = configured(tmp_path / "run", "csv")
    file = tmp_path / "run" / "metrics.csv"
    record(config, range(3), 1.0)
    before = file.read_text().splitlines()[0]
    assert before == "step,split,loss,num_tokens,rewards/margins,epoch"
    record(config, range(2, 9), 2.0)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == [*before.split(","), "perf/late"]
    held = [{name: str(value) for name, value in row.items()} for row in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert [{name: value for name, value in row.items() if value} for row in rows] == held


def test_wandb_offline_keeps_one_run_and_sends_nothing_twice_within_a_part(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason='needs W&B: pip install "dpo-cli[wandb]"')
    config = configured(tmp_path / "run", "wandb", words=("logger.wandb.mode=offline", "logger.wandb.tags=[mine]"))
    said = killed_and_resumed(config, again=1.0)
    assert len([line for line in said if "wandb sync" in line]) == 2, said
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    (identity,) = {part.name for part in parts}
    assert identity == f"run-{json.loads((tmp_path / 'run/trackers.json').read_text())['id']}.wandb"
    held: dict[str, dict[int, float]] = {}
    for part in parts:
        kept = wandb_records(part)
        assert {*kept["tags"]} == {"dpo", "base", "pairs.jsonl", "mine"}
        assert kept["config"]["loss"]["beta"] == config.loss.parameters["beta"]
        for row in kept["history"]:
            for name, value in row.items():
                if "/" in name:
                    held.setdefault(name, {})[row["step"]] = value
    assert {name: sorted(curve.items()) for name, curve in held.items()} == expected(tmp_path / "run")
    assert kept["summary"]["final/eval/loss"] == 1.0
    assert kept["alerts"] == ["chosen_falling"]


def wandb_records(file: Path) -> dict[str, Any]:
    """What W&B wrote into a file of its own format."""
    from wandb.proto import wandb_internal_pb2

    kept: dict[str, Any] = {"history": [], "summary": {}, "alerts": []}
    # W&B's own process closes the file when it has answered us.
    deadline, size = time.monotonic() + 20, -1
    while size != (size := file.stat().st_size) or not size:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for data in leveldb_log(file.read_bytes()):
        read = wandb_internal_pb2.Record()
        read.ParseFromString(data)
        kind = read.WhichOneof("record_type")
        if kind == "run":
            kept["tags"] = list(read.run.tags)
            kept["config"] = {item.key: json.loads(item.value_json) for item in read.run.config.update}
        elif kind == "history":
            kept["history"].append(_items(read.history.item))
        elif kind == "summary":
            kept["summary"] |= _items(read.summary.update)
        elif kind == "alert":
            kept["alerts"].append(read.alert.title)
    return kept


def leveldb_log(data: bytes, *, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """The records of a log as LevelDB has it: checksum, length, kind (whole, first, middle, last), bytes."""
    at, parts = header, b""
    while at + header <= len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            yield parts
            parts = b""


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_mlflow_holds_every_step_once_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason='needs MLflow: pip install "dpo-cli[mlflow]"')
    from mlflow import MlflowClient

    config = configured(tmp_path / "run", "mlflow", words=("logger.mlflow.tags=[mine]",))
    said = killed_and_resumed(config, again=1.0)
    assert not [line for line in said if "failed" in line], said
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dpo-cli").experiment_id])
    for name, curve in expected(tmp_path / "run").items():
        assert sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)) == curve
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["loss.beta"] == str(config.loss.parameters["beta"])
    assert run.data.metrics["final/eval/loss"] == 1.0
    assert {"dpo", "mine", "health.chosen_falling"} <= run.data.tags.keys()


def test_trackio_holds_every_step_in_one_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason='needs trackio: pip install "dpo-cli[trackio]"')
    # In a process of its own: trackio decides where it keeps its files when it is imported.
    code = (
        "import sys; from pathlib import Path; from tests.train.test_trackers import *\n"
        "killed_and_resumed(configured(Path('run').absolute(), 'trackio'), again=1.0)\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(name,) = S.get_runs('dpo-cli')\n"
        "print(json.dumps([S.get_logs('dpo-cli', name), S.get_run_config('dpo-cli', name), S.get_alerts('dpo-cli')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment(TRACKIO_DIR=str(tmp_path / "trackio")),
    )
    assert done.returncode == 0, done.stderr
    logs, settings, alerts = json.loads(done.stdout.splitlines()[-1])
    held: dict[str, dict[int, float]] = {}
    for row in logs:
        for name, value in row.items():
            if "/" in name and not name.startswith("final/"):
                held.setdefault(name, {})[row["step"]] = value
    assert {name: sorted(curve.items()) for name, curve in held.items()} == expected(tmp_path / "run")
    assert logs[-1]["final/eval/loss"] == 1.0
    assert settings["tags"] == ["dpo", "base", "pairs.jsonl"]
    assert {alert["title"] for alert in alerts} == {"chosen_falling"}


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | more


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run waits for a moment only."""
    monkeypatch.setattr("dpo_cli.tracking.trackers.CLOSING_SECONDS", 1.0)


class Hanging(Tracker):
    """A tracker whose network is gone."""

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        time.sleep(60)
        return None

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        raise AssertionError("never begun")


class Refusing(Tracker):
    """A tracker whose disk is full from its second line on, for a while."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        return None

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        if 0 < step < 3:
            raise OSError(28, "No space left on device")
        self.steps.append(step)


def test_a_tracker_that_hangs_or_fails_costs_a_warning_and_no_time(tmp_path: Path, brief: None) -> None:
    config = configured(tmp_path / "run")
    (tmp_path / "run").mkdir()
    said: list[str] = []
    refusing = Refusing()
    began = time.monotonic()
    with Trackers(config, tmp_path / "run", {"hanging": Hanging(), "refusing": refusing}) as trackers:
        trackers.begin(0, said.append)
        for step in range(5):
            trackers.log(step, "train", {"loss": 1.0})
        assert time.monotonic() - began < 15
    assert time.monotonic() - began < 30
    assert refusing.steps == [0, 3, 4]
    assert len([line for line in said if "refusing has failed" in line and "No space left" in line]) == 1
    assert len([line for line in said if "hanging has failed" in line and "still sending" in line]) == 1


class Slow(Tracker):
    """A tracker that opens only once it may, and then keeps up."""

    def __init__(self) -> None:
        self.may_open, self.closed = threading.Event(), threading.Event()
        self.lines = 0

    def begin(self, run: RunFacts, after_step: int) -> str | None:
        assert self.may_open.wait(60)
        return "it is open"

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.lines += 1

    def end(self, ending: Ending) -> None:
        self.closed.set()


@pytest.mark.parametrize("in_time", [True, False])
def test_a_tracker_that_did_not_keep_up_is_closed_and_says_nothing_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    monkeypatch.setattr("dpo_cli.tracking.background._WAITING_AT_MOST", 3)
    monkeypatch.setattr("dpo_cli.tracking.trackers.FAILING_SECONDS", 20.0 if in_time else 0.2)
    config = configured(tmp_path / "run")
    (tmp_path / "run").mkdir()
    said: list[str] = []
    slow = Slow()
    with pytest.raises(DpoError), Trackers(config, tmp_path / "run", {"slow": slow}, ranks=2) as trackers:
        trackers.begin(0, said.append)
        for step in range(9):
            trackers.log(step, "train", {"loss": 1.0})
        if in_time:
            slow.may_open.set()
        raise DpoError("one of two ranks has failed")
    assert slow.closed.is_set() == in_time
    slow.may_open.set()
    assert slow.closed.wait(20)
    assert slow.lines in (2, 3), "begin waits among them until it is taken up"
    assert ("slow: it is open" in said) == in_time
    assert len([line for line in said if "does not keep up" in line]) == 1


def test_a_full_disk_leaves_a_whole_table_and_the_rest_of_the_trackers(small_disk: Path) -> None:
    config = configured(small_disk / "run", "csv", "tensorboard")
    said = record(config, range(3), 1.0)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    trackers = Trackers.of(config, small_disk / "run")
    with trackers:
        trackers.begin(2, said.append)
        for step in range(3, 60):
            trackers.log(step, "train", {"loss": 1.0, "rewards/margins": 1.0, "epoch": 1.0})
        filler.unlink(missing_ok=True)
    with (small_disk / "run/metrics.csv").open(newline="") as opened:
        assert len({len(row) for row in csv.reader(opened)}) == 1


@pytest.mark.parametrize("file", ["metrics.jsonl", "../mine.csv", "/home/me/mine.csv"])
def test_a_table_takes_the_place_of_nothing_else(file: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a CSV file in the run folder"):
        configured(Path("run"), "csv", words=(f"logger.csv.file={file}",))


@pytest.mark.parametrize("library", ["wandb", "mlflow", "trackio"])
def test_a_missing_library_is_told_before_anything_starts(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.config.logger_checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs the package {library}") as caught:
        configured(Path("run"), library, words=("logger.wandb.mode=offline",) if library == "wandb" else ())
    assert f'pip install "dpo-cli[{library}]"' in str(caught.value)


def test_wandb_without_a_login_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.config.logger_checks.find_spec", lambda name: object())
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="Nobody is logged in to W&B"):
        configured(tmp_path / "run", "wandb")
    assert configured(tmp_path / "run", "wandb", words=("logger.wandb.mode=offline",)).logger.wandb is not None
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password none\n")
    assert configured(tmp_path / "run", "wandb").logger.wandb is not None
