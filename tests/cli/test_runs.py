"""Run folders, sweeps and resuming, up to the moment of training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dpo_cli.cli.run_folder import exclusive
from dpo_cli.cli.train import main
from dpo_cli.errors import CheckpointError, DataError, DpoError, Interrupted, NonFiniteError

from .conftest import HandedOver

REAL = "model=qwen2-0.5b"
Refused = Callable[..., str]


def saved(path: Path) -> dict[str, object]:
    return yaml.safe_load(path.read_text())


def test_a_run_folder_holds_its_resolved_configuration_and_what_was_typed(
    folder: Path, handed_over: HandedOver
) -> None:
    assert main([REAL, "loss.beta=0.2", "run_dir=a/b"]) == 0
    (config,) = handed_over.configs
    assert saved(folder / "a/b/config.yaml") == config.as_dict()
    assert config.loss.parameters["beta"] == 0.2
    request = saved(folder / "a/b/overrides.yaml")
    assert request["overrides"] == [REAL, "loss.beta=0.2", "run_dir=a/b"]


def test_nothing_else_is_left_in_the_folder_it_was_started_from(folder: Path, handed_over: HandedOver) -> None:
    assert main([REAL]) == 0
    assert [path.name for path in folder.iterdir()] == ["outputs"]
    (run,) = (folder / "outputs").iterdir()
    assert str(run.relative_to(folder)) == handed_over.configs[0].run_dir
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml", "log.txt", "overrides.yaml"]


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(folder: Path, handed_over: HandedOver) -> None:
    for _ in range(4):
        assert main([REAL]) == 0
    assert len({config.run_dir for config in handed_over.configs}) == 4


def test_an_empty_folder_may_be_filled(folder: Path, handed_over: HandedOver) -> None:
    (folder / "new").mkdir()
    assert main([REAL, "run_dir=new"]) == 0
    assert (folder / "new" / "config.yaml").exists()


def test_a_resumed_run_goes_on_with_what_was_typed_before_and_now(folder: Path, handed_over: HandedOver) -> None:
    assert main([REAL, "optimizer=rmsprop", "optimizer.momentum=0.5", "run_dir=run"]) == 0
    assert main(["resume=run", "log_every=1"]) == 0
    first, second = handed_over.configs
    assert second == first.model_copy(update={"log_every": 1})
    assert saved(folder / "run/config.yaml")["log_every"] == 1
    assert main(["resume=run/"]) == 0
    assert handed_over.configs[2].log_every == 1


def test_a_moved_run_is_resumed_where_it_is(folder: Path, handed_over: HandedOver) -> None:
    assert main([REAL, "run_dir=run"]) == 0
    (folder / "run").rename(folder / "elsewhere")
    assert main(["resume=elsewhere"]) == 0
    assert handed_over.configs[1].run_dir == "elsewhere"


def test_a_run_of_user_files_is_resumed_with_them(folder: Path, handed_over: HandedOver) -> None:
    (folder / "conf").mkdir()
    (folder / "conf/my_run.yaml").write_text("defaults: [config, override model: qwen2-7b, _self_]\nseed: 7\n")
    assert main(["--config-dir", "conf", "--config-name", "my_run", "run_dir=run"]) == 0
    assert main(["resume=run"]) == 0
    assert handed_over.configs[1].seed == 7


def test_a_resumed_run_stays_the_same_experiment(folder: Path, handed_over: HandedOver, refused: Refused) -> None:
    assert main([REAL, "run_dir=run"]) == 0
    before = (folder / "run/config.yaml").read_bytes()
    said = refused("resume=run", "loss.beta=0.5", "seed=1", "log_every=3")
    assert "loss.beta: 0.1 -> 0.5" in said
    assert "seed: 42 -> 1" in said
    assert "log_every" not in said
    assert (folder / "run/config.yaml").read_bytes() == before
    assert len(handed_over.configs) == 1


def test_a_damaged_run_folder_is_named(folder: Path, handed_over: HandedOver, refused: Refused) -> None:
    assert main([REAL, "run_dir=run"]) == 0
    (folder / "run/overrides.yaml").write_text("overrides: [")
    assert "run/overrides.yaml" in refused("resume=run")
    (folder / "run/overrides.yaml").write_text("overrides: []")
    assert "overrides.yaml is damaged" in refused("resume=run")


def test_a_folder_inside_a_run_points_to_the_run(folder: Path, handed_over: HandedOver, refused: Refused) -> None:
    assert main([REAL, "run_dir=run"]) == 0
    (folder / "run/checkpoints/step-00000050").mkdir(parents=True)
    assert f"resume={folder / 'run'}" in refused("resume=run/checkpoints/step-00000050")


def test_sweep_jobs_are_numbered_inside_one_folder(folder: Path, handed_over: HandedOver) -> None:
    assert main(["-m", REAL, "loss=dpo,hinge", "loss.beta=0.1,0.5", "run_dir=sweep"]) == 0
    assert [config.run_dir for config in handed_over.configs] == [f"sweep/{number}" for number in range(4)]
    chosen = [(config.loss.name, config.loss.parameters["beta"]) for config in handed_over.configs]
    assert chosen == [("dpo", 0.1), ("dpo", 0.5), ("hinge", 0.1), ("hinge", 0.5)]
    assert saved(folder / "sweep/2/overrides.yaml")["overrides"][1:3] == ["loss=hinge", "loss.beta=0.1"]


def test_a_sweep_without_a_name_gets_one_folder(folder: Path, handed_over: HandedOver) -> None:
    assert main(["-m", REAL, "seed=1,2"]) == 0
    (parent,) = (folder / "outputs").iterdir()
    assert parent.name.endswith("_sweep")
    assert {path.name for path in parent.iterdir()} == {
        ".lock", "sweep.yaml", "outcomes.json", "sweep.csv", "sweep.json", "0", "1"
    }  # fmt: skip


def test_a_fault_in_the_last_job_is_found_before_the_first_begins(
    folder: Path, handed_over: HandedOver, refused: Refused
) -> None:
    assert "loss.beta must be greater than 0, not 0" in refused("-m", REAL, "loss.beta=0.1,0.5,0")
    assert not handed_over.configs
    assert not list(folder.iterdir())


def test_a_job_of_a_sweep_is_resumed_by_its_folder(folder: Path, handed_over: HandedOver) -> None:
    assert main(["-m", REAL, "seed=1,2", "run_dir=sweep"]) == 0
    assert main(["resume=sweep/1"]) == 0
    assert handed_over.configs[2] == handed_over.configs[1]


@pytest.mark.parametrize(
    ("failure", "code"),
    [(Interrupted("Step 5 is saved."), 75), (NonFiniteError("NaN"), 3), (KeyboardInterrupt(), 130), (DpoError("x"), 2)],
)
def test_a_job_that_fails_stops_the_sweep_with_its_exit_code(
    failure: BaseException, code: int, folder: Path, handed_over: HandedOver, capsys: pytest.CaptureFixture[str]
) -> None:
    handed_over.raises[1] = failure
    assert main(["-m", REAL, "seed=1,2,3", "run_dir=sweep"]) == code
    assert len(handed_over.configs) == 2
    assert "dpo-train resume=sweep/1" in capsys.readouterr().err


def test_a_sweep_goes_on_with_the_job_that_stopped_it_and_those_behind(folder: Path, handed_over: HandedOver) -> None:
    handed_over.raises[1] = Interrupted("Step 5 is saved.")
    assert main(["-m", REAL, "seed=1,2,3", "run_dir=sweep"]) == 75
    assert main(["resume=sweep"]) == 0
    assert [config.seed for config in handed_over.configs] == [1, 2, 2, 3]
    assert [config.run_dir for config in handed_over.configs] == ["sweep/0", "sweep/1", "sweep/1", "sweep/2"]
    assert main(["resume=sweep", "sweep.metric=eval/loss"]) == 0
    assert len(handed_over.configs) == 4


def test_a_failure_that_nobody_foresaw_is_told_shortly_and_logged_whole(
    folder: Path, handed_over: HandedOver, capsys: pytest.CaptureFixture[str]
) -> None:
    handed_over.raises[0] = ZeroDivisionError("surprise")
    assert main([REAL, "run_dir=run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dpo-train: ZeroDivisionError: surprise\n")
    assert "in run_training: raise failure" in said and "whole traceback: run/log.txt" in said
    assert "Traceback" not in said
    assert "Traceback" in (folder / "run/log.txt").read_text()


def test_what_ends_before_anything_was_computed_leaves_its_name_free(folder: Path, handed_over: HandedOver) -> None:
    handed_over.raises |= {0: DataError("row 2 is broken"), 1: NonFiniteError("the loss is not finite")}
    assert main([REAL, "run_dir=run"]) == 2
    assert not (folder / "run").exists()
    assert main([REAL, "run_dir=run"]) == 3
    assert (folder / "run/log.txt").exists()


def test_a_full_disk_is_no_bug(handed_over: HandedOver, capsys: pytest.CaptureFixture[str]) -> None:
    handed_over.raises[0] = OSError(28, "No space left on device", "run/checkpoints/x")
    assert main([REAL]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said


def test_two_processes_never_train_in_one_folder(folder: Path) -> None:
    code = (
        "from pathlib import Path\nfrom dpo_cli.cli.run_folder import exclusive\nwith exclusive(Path()): print('held')"
    )
    with exclusive(folder):
        other = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        assert "Another process is training" in other.stderr
    with exclusive(folder):
        pass
    assert issubclass(CheckpointError, DpoError)
