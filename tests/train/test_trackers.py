"""TensorBoard shows every step once, however often a run was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpo_cli.train.trackers import Trackers


def record(folder: Path, *, after_step: int, steps: range, value: float) -> None:
    with Trackers(folder) as trackers:
        trackers.begin(after_step)
        for step in steps:
            trackers.log(step, "train", {"loss": value})


@pytest.mark.parametrize(
    ("after_step", "again", "expected"),
    [
        (3, range(4, 7), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]),
        (0, range(3), [(0, 2.0), (1, 2.0), (2, 2.0)]),
    ],
    ids=["resumed after step 3", "killed before its first checkpoint"],
)
def test_what_came_after_the_checkpoint_is_superseded(
    tmp_path: Path, after_step: int, again: range, expected: list[tuple[int, float]]
) -> None:
    record(tmp_path, after_step=0, steps=range(6), value=1.0)
    # Event files are read in the order of their names, which begin with the second they were made in.
    first = next(tmp_path.iterdir())
    first.rename(first.with_name(first.name.replace("tfevents.", "tfevents.0")))
    record(tmp_path, after_step=after_step, steps=again, value=2.0)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected
