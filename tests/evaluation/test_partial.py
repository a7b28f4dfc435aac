"""What was finished before a stop or a kill is there afterwards, and never mixed with what other settings gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpo_cli.errors import CheckpointError
from dpo_cli.evaluation.partial import PartialResponses

SETTINGS = {"seed": 1, "prompts": "abc", "stop tokens": [0]}


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def found(partial: PartialResponses) -> dict[int, list[list[int]]]:
    return {number: [each.tolist() for each in responses] for number, responses in partial.read().items()}


def test_every_start_of_every_rank_adds_to_what_is_there(tmp_path: Path) -> None:
    partial = PartialResponses(tmp_path / "policy")
    partial.begin(SETTINGS)
    assert found(partial) == {}
    first, second = partial.writer(), partial.writer()
    first.add({3: [ids(5, 0), ids(0)]})
    second.add({1: [ids(7)]})
    first.add({2: [ids(9, 9)]})
    assert found(partial) == {3: [[5, 0], [0]], 1: [[7]], 2: [[9, 9]]}


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_a_kill_cut_off_is_as_if_it_never_was(tmp_path: Path, cut: int) -> None:
    partial = PartialResponses(tmp_path)
    partial.begin(SETTINGS)
    writer = partial.writer()
    writer.add({1: [ids(7, 0)]})
    writer.add({2: [ids(11, 12, 13, 14, 15, 16, 0)]})
    whole = writer.path.read_bytes()
    writer.path.write_bytes(whole[:-cut])
    # Without its line break alone, the last line is whole.
    assert set(found(partial)) == ({1, 2} if cut == 1 else {1})
    # The next start writes to a file of its own, behind no broken line.
    partial.writer().add({2: [ids(11, 0)]})
    assert found(partial)[2] in ([[11, 0]], [[11, 12, 13, 14, 15, 16, 0]])


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    partial = PartialResponses(tmp_path)
    partial.begin(SETTINGS)
    partial.begin(dict(SETTINGS))
    with pytest.raises(CheckpointError, match="another prompts, seed are kept"):
        partial.begin({**SETTINGS, "seed": 2, "prompts": "abd"})
