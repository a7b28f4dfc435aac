"""Every layout of ranks and stages trains what one process trains, up to the rounding of sums."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "layouts.py"


@pytest.fixture(scope="module")
def layouts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layouts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_layout_trains_what_one_process_trains(layouts: ModuleType, ranks: int) -> None:
    found = layouts.launch(ranks)
    assert [row["case"] for row in found] == [case.name for case in layouts.cases()]
    for row in found:
        assert row["loss"] < 2e-6, row
        assert row["gradient_norm"] < 1e-5, row
        assert row["weights"] < 2e-5, row
