"""The PDPO experiment's script: nothing is run twice, the grid decides what is tested, and the tables count right."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def experiment() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    import pdpo

    yield pdpo
    sys.path[:] = before


def row(case: Any, exact_match: float) -> dict[str, Any]:
    return {"key": case.key, **json.loads(json.dumps(asdict(case))), "exact_match": exact_match}


@pytest.fixture(scope="module")
def study(experiment: ModuleType) -> Any:
    return experiment.STUDIES["truth"]


def whole_grid(study: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Of which beta 0.5, hinge gamma 3 and policy gradient gamma 0.3 are the best."""

    def is_best(case: Any) -> bool:
        gamma = {"hinge": 3.0, "policy_gradient": 0.3}.get(case.method)
        return case.beta == 0.5 if case.method == "dpo" else gamma is not None and case.gamma == gamma

    return [row(case, 0.7 if is_best(case) else 0.6) for case in study.grid_cases(seeds)]


def test_what_is_tested_was_chosen_on_the_tuning_seeds_alone(study):
    grid = whole_grid(study, study.tuning_seeds)
    # Were test results looked at, beta 2 would be chosen.
    spoilt = [row(study.case(seed, "test", "dpo", 2.0), 1.0) for seed in study.test_seeds]
    cases = list(study.final_cases([*grid, *spoilt], study.test_seeds))
    assert {case.beta for case in cases} == {None, 0.5, study.small_beta}
    assert {case.gamma for case in cases if case.method == "hinge"} == {0.3, 1.0, 3.0}
    assert {case.gamma for case in cases if case.method == "policy_gradient"} == {0.3}
    assert {case.seed for case in cases}.isdisjoint(study.tuning_seeds)
    assert {case.split for case in cases} == {"test"}


def test_a_grid_with_gaps_decides_nothing(study):
    grid = [row for row in whole_grid(study, study.tuning_seeds) if row["method"] != "dpo"]
    with pytest.raises(SystemExit, match="The grid lacks dpo"):
        list(study.final_cases(grid, (0,)))


def test_methods_are_compared_seed_by_seed_with_the_standard_error_of_the_difference(study):
    import pdpo_table

    # Bases differ by twenty points, the method's gain over them by two: +9, +10, +11.
    rows = [row(study.case(seed, "test", "base"), 0.5 + 0.1 * seed) for seed in range(3)]
    rows += [row(study.case(seed, "test", "hinge", 1.0, 0.3), 0.59 + 0.11 * seed) for seed in range(3)]
    table = pdpo_table.test_table(pdpo_table.settings_of(rows, split="test"))
    assert "| base | 60.0 ± 5.8 |" in table
    assert "| 1 | PDPO hinge, gamma 0.3 | 70.0 ± 6.4 | +10.0 ± 0.6 |" in table


def test_the_page_keeps_what_stands_around_its_tables(study, tmp_path):
    import pdpo_table

    page = tmp_path / "pdpo_results.md"
    page.write_text(f"before\n{pdpo_table.BEGIN}\nold tables\n{pdpo_table.END}\nafter\n")
    grid = whole_grid(study, (100, 101))
    for _ in range(2):
        pdpo_table.write_tables(grid, tmp_path)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old tables" not in text
        # At beta 0.5, on both seeds ten points over the bases.
        assert "| DPO, discriminator's pairs | +0.0 (+0.0, +0.0) | +10.0 (+10.0, +10.0) | +0.0 (+0.0, +0.0) |" in text
    assert len(json.loads((tmp_path / "pdpo_results.json").read_text())["results"]) == len(grid)


@pytest.mark.slow
def test_the_whole_chain_runs_from_an_untrained_model_to_table_and_picture(experiment, study, tmp_path, capsys):
    from pdpo_base import Sizes
    from pdpo_runs import Workshop

    tiny = Sizes(
        demonstrations=60, sft_steps=6, sft_batch=8, lowest_accuracy=0, preference_problems=40, samples_per_problem=2,
        held_out_problems=20, validation_problems=20, test_problems=20,
    )  # fmt: skip
    workshop = Workshop(tmp_path, {"quick": tiny})
    cases = [
        case
        for case in study.grid_cases((7,))
        if case.method in ("base", "dpo") or (case.method == "hinge" and case.gamma == 0.3)
        if case.beta in (None, 0.1)
    ]
    workshop.run(cases)
    rows = workshop.rows()
    assert [row["method"] for row in rows] == ["base", "dpo", "hinge"]
    assert all(0 <= row["exact_match"] <= 1 and 0 < row["tokens"] <= 48 for row in rows)
    dpo, hinge = rows[1:]
    assert dpo["generator_active_fraction"] is None
    assert 0 < hinge["generator_active_fraction"] <= 1
    assert dpo["chosen_change"] != hinge["chosen_change"]
    workshop.run(cases)
    assert workshop.rows() == rows

    for stage in ("table", "draw"):
        experiment.run_stage(stage, workshop, study, None, tmp_path / "docs")
    page = (tmp_path / "docs" / "pdpo_results.md").read_text()
    assert "| PDPO hinge, gamma 0.3 | 0.1 |" in page
    assert "</svg>" in (tmp_path / "docs" / "pdpo_truth.svg").read_text()
    assert (tmp_path / "docs" / "pdpo_truth.png").read_bytes().startswith(b"\x89PNG")
    assert "hinge" in capsys.readouterr().out
