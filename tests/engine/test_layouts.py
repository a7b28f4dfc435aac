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
        # Two ranks pack other rows than one, which bfloat16 rounds otherwise: it keeps two to three digits.
        noise = ranks > 1 and "bfloat16" in row["case"]
        assert row["loss"] < (1e-2 if noise else 2e-6), row
        assert row["gradient_norm"] < (1e-2 if noise else 1e-5), row
        assert row["weights"] < (1e-2 if noise else 2e-5), row


def test_the_condensed_table_has_the_largest_figures_of_every_group_and_goes_where_it_is_marked(
    layouts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = layouts.cases()
    found = [
        {
            "ranks": 2,
            "case": case.name,
            "group": case.group,
            "loss": number * 1e-9,
            "gradient_norm": 0.0,
            "weights": 1e-7,
        }
        for number, case in enumerate(cases)
    ]
    groups = {row["case"]: row for row in layouts.condensed(found)}
    assert list(groups) == list(dict.fromkeys(case.group for case in cases))
    for name, row in groups.items():
        assert row["loss"] == max(number for number, case in enumerate(cases) if case.group == name) * 1e-9
    document = tmp_path / "document.md"
    document.write_text(f"before\n{layouts.BEGIN}old\n{layouts.END}\nafter\n")
    monkeypatch.setattr(layouts, "DOCUMENT", document)
    layouts.write(layouts.table(found[:1]))
    head, line = "| ranks | layout | loss | gradient norm | weights |", f"| 2 | {cases[0].name} | 0 | 0 | 1e-07 |"
    table = f"{head}\n|---|---|---|---|---|\n{line}\n"
    assert document.read_text() == f"before\n{layouts.BEGIN}{table}{layouts.END}\nafter\n"


def test_the_table_in_the_documentation_has_a_line_for_every_group(layouts: ModuleType) -> None:
    table = layouts.DOCUMENT.read_text().split(layouts.BEGIN)[1].split(layouts.END)[0]
    told = [tuple(line.split(" | ")[:2]) for line in table.splitlines()[2:]]
    groups = dict.fromkeys(case.group for case in layouts.cases())
    assert told == [(f"| {ranks}", group) for ranks in (2, 1) for group in groups]
