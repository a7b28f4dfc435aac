"""Findings while a run trains: said once, kept in health.jsonl, and named ones end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.health.curves import Setup
from dpo_cli.health.monitor import Monitor, Told
from dpo_cli.train.health_watch import HEALTH, HealthWatch
from dpo_cli.train.metrics_log import MetricsLog, read_metrics


class Watched:
    """A folder's metrics and the watch over them."""

    def __init__(self, folder: Path, *stop_on: str) -> None:
        self.said: list[str] = []
        self.metrics = MetricsLog(folder / "metrics.jsonl")
        self.health = folder / HEALTH
        setup = Setup.of(check(compose(Request(()))).as_dict())
        self.watch = HealthWatch(Monitor(setup), stop_on, MetricsLog(self.health), self._say)

    def _say(self, told: Told) -> None:
        self.said.append(told.as_text())

    def train(self, *steps: int, fall: float) -> Watched:
        for step in steps:
            row = {"logps/chosen": -100.0, "rewards/chosen": -3 * fall, "rewards/rejected": -9 * fall, "loss": 0.5}
            self.metrics.append(step, "train", row)
            self.watch.after({"step": step, "split": "train", **row})
        return self

    def told(self) -> list[dict[str, Any]]:
        return list(read_metrics(self.health))


def test_what_is_said_is_kept_in_the_run_folder_with_its_step(tmp_path: Path) -> None:
    watched = Watched(tmp_path).train(10, 20, 30, 40, fall=10)
    (row,) = watched.told()
    assert (row["step"], row["split"], row["name"], row["severity"]) == (30, "train", "chosen_falling", "note")
    (said,) = watched.said
    assert row["what"] in said and row["why"] in said and all(remedy in said for remedy in row["try"])


def test_a_note_ends_no_run_a_warning_does_and_only_where_it_is_named(tmp_path: Path) -> None:
    named = Watched(tmp_path, "chosen_falling").train(10, 20, 30, fall=10)
    assert named.watch.ends is None
    ends = named.train(40, 50, 60, fall=80).watch.ends
    assert ends is not None and (ends.name, ends.step) == ("chosen_falling", 50)
    assert Watched(tmp_path, "loss_at_ln2").train(10, 20, 30, fall=80).watch.ends is None


def test_a_resumed_run_repeats_in_silence_and_ends_where_the_first_did(tmp_path: Path) -> None:
    first = Watched(tmp_path, "chosen_falling").train(10, 20, 30, fall=10).train(40, 50, 60, fall=80)
    told, ends = first.told(), first.watch.ends
    resumed = Watched(tmp_path, "chosen_falling")
    resumed.watch.repeat(tmp_path / "metrics.jsonl")
    assert resumed.said == []
    assert (resumed.told(), resumed.watch.ends) == (told, ends)


def test_lines_that_a_resume_takes_back_take_what_was_told_of_them_back(tmp_path: Path) -> None:
    first = Watched(tmp_path).train(10, 20, 30, fall=10).train(40, 50, 60, fall=80)
    first.metrics.truncate_after(40)
    resumed = Watched(tmp_path)
    resumed.watch.repeat(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in resumed.told()] == [30]


def test_a_run_that_has_no_metrics_yet_has_nothing_to_repeat(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watch.repeat(tmp_path / "metrics.jsonl")
    assert not watched.health.exists() or not watched.told()


@pytest.mark.parametrize(
    "words", [("health.stop_on=[policy_colapsed]",), ("health.stop_on=[chosen_falling]", "health.enabled=false")]
)
def test_what_can_never_end_a_run_is_refused(words: tuple[str, ...]) -> None:
    from dpo_cli.errors import ConfigError

    with pytest.raises(ConfigError, match=r"did you mean policy_collapsed|health\.enabled=true") as refused:
        check(compose(Request(words)))
    assert "health.stop_on" in str(refused.value)
