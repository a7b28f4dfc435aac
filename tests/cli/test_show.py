"""`show=` tells what there is to choose from, at once; help begins with what one begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_cli.cli.data import main as data_main
from dpo_cli.cli.help import OFTEN_SET
from dpo_cli.cli.sample import main as sample_main
from dpo_cli.cli.train import main
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.keys import known_keys
from dpo_cli.config.shipped import GROUPS, choices, description, file_of

Refused = Callable[..., str]


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_has_its_line_and_its_words(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"show={group}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == choices(group)
    for choice in choices(group):
        assert 15 < len(description(file_of(group, choice))) < 190


@pytest.mark.parametrize("words", ["show=", "show=groups"])
def test_all_groups_are_told(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([words]) == 0
    told = capsys.readouterr().out
    assert all(f"  {group} " in told for group in GROUPS)
    assert sample_main([words]) == 0
    told = capsys.readouterr().out
    assert "  hardware" in told and "  loss" not in told


def test_the_default_is_marked_and_ones_own_files_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "conf/loss").mkdir(parents=True)
    (folder / "conf/loss/mine.yaml").write_text("# A loss of mine. More of it.\n_target_: mine.loss\n_partial_: true\n")
    assert main(["show=loss", "--config-dir", "conf"]) == 0
    told = capsys.readouterr().out
    assert "  dpo * " in told
    assert any(line.split() == ["mine", "A", "loss", "of", "mine"] for line in told.splitlines())


def test_one_choice_shows_its_keys_those_it_builds_on_included(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show=model/qwen2-7b"]) == 0
    told = capsys.readouterr().out
    assert (
        "  model.path=Qwen/Qwen2-7B-Instruct" in told and "  model.lora.rank=null" in told and "Folder, or hub" in told
    )
    assert data_main(["show=keys"]) == 0
    assert "  fail_on=" in capsys.readouterr().out


def test_what_is_not_there_is_refused_with_what_is(refused: Refused) -> None:
    assert "did you mean loss?" in refused("show=los")
    assert "did you mean kto?" in refused("show=loss/ktoo")


def test_what_help_calls_often_set_are_keys() -> None:
    values = check(compose(Request(("model.lora.rank=8",)))).as_dict()
    assert {example.partition("=")[0] for example in OFTEN_SET} <= set(known_keys(values))
