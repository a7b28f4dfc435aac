"""dpo-train up to the moment at which it hands a checked configuration over for training."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dpo_cli.cli.train import main
from dpo_cli.config.schema import Config


@dataclass
class HandedOver:
    """What training was asked to do. raises: what it does instead of training, by the number of the call."""

    configs: list[Config] = field(default_factory=list)
    raises: dict[int, BaseException] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start from."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> HandedOver:
    """Stands where training begins: these tests end there, those in end_to_end/ go on with the real thing."""
    record = HandedOver()

    def run_training(config: Config, *, run_dir: Path) -> None:
        assert run_dir == Path(config.run_dir)
        record.configs.append(config)
        if failure := record.raises.get(len(record.configs) - 1):
            raise failure

    module = types.ModuleType("dpo_cli.train.run")
    module.run_training = run_training  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dpo_cli.train.run", module)
    return record


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run dpo-train with bad input: what it says, having ended with exit code 2 and without a traceback."""

    def call(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert said.err.startswith("dpo-train: ")
        return said.err

    return call
