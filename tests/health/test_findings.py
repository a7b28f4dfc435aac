"""What is told of recorded runs: of bad settings what is wrong with them, of good ones nothing.

curves/ holds metrics.jsonl of runs of the embedded example, without speed and epoch; the first line is the command's
overrides. coin.jsonl holds the example's pairs, chosen and rejected exchanged by a coin (random.Random(0), a row each).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.schema import Config
from dpo_cli.health.curves import Curves, Setup, Severity
from dpo_cli.health.monitor import FINDINGS, Monitor, Told

CURVES = Path(__file__).parent / "curves"
NOTE, WARNING, ALARM = Severity
# Of each recorded run, all that is told, and how severe it becomes.
EXPECTED = {
    "example": {},
    "pdpo": {},
    "kto": {"chosen_falling": NOTE},
    "lr_large": {"policy_collapsed": ALARM, "chosen_falling": WARNING, "accuracy_at_chance": ALARM},
    "lr_tiny": {"loss_at_ln2": WARNING},
    "beta_large": {"beta_too_large": WARNING},
    "beta_small": {"chosen_falling": WARNING},
    "wrong_reference": {"reference_mismatch": WARNING, "chosen_falling": WARNING},
    "coin_labels": {"accuracy_at_chance": WARNING},
    "few_pairs": {"chosen_falling": WARNING, "margins_saturated": WARNING},
    "pdpo_away": {"generator_runs_away": WARNING, "gradient_spikes": NOTE, "generator_inactive": NOTE},
    "pdpo_collapse": {
        "chosen_falling": WARNING,
        "policy_collapsed": ALARM,
        "kl_large": ALARM,
        "eos_rate_falling": ALARM,
        "length_drift": NOTE,
        "generator_inactive": NOTE,
    },
    "pdpo_cut": {"generator_inactive": WARNING},
}
DOCS = Path(__file__).parents[2] / "docs" / "health.md"


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorded commands name."""
    (tmp_path / "beta_small" / "final").mkdir(parents=True)
    (tmp_path / "coin.jsonl").touch()
    monkeypatch.chdir(tmp_path)


@cache
def recorded(name: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The overrides of a run, and its lines of metrics."""
    first, *rows = (json.loads(line) for line in (CURVES / f"{name}.jsonl").read_text().splitlines())
    return first["command"].split(), rows


def configure(*overrides: str) -> Config:
    return check(compose(Request(tuple(overrides))))


def setup_of(*overrides: str) -> Setup:
    return Setup.of(configure(*overrides).as_dict())


def told_of(name: str) -> list[Told]:
    overrides, rows = recorded(name)
    return told(setup_of(*overrides), rows)


def told(setup: Setup, rows: Iterable[dict[str, Any]]) -> list[Told]:
    monitor = Monitor(setup)
    return [one for row in rows for one in monitor.after(row)]


def lines(count: int, *, first: int = 10, every: int = 10, **values: float) -> list[dict[str, Any]]:
    """Training lines that all say the same; `__` stands for the slash in a name."""
    metrics = {name.replace("__", "/"): value for name, value in values.items()}
    return [{"step": first + every * number, "split": "train", **metrics} for number in range(count)]


@pytest.mark.parametrize("name", EXPECTED)
def test_of_a_recorded_run_exactly_this_is_told(name: str) -> None:
    worst: dict[str, Severity] = {}
    for one in told_of(name):
        worst[one.name] = max(worst.get(one.name, NOTE), one.finding.severity)
    assert worst == EXPECTED[name]


def test_every_recording_is_listed_and_every_finding_has_one() -> None:
    assert {file.stem for file in CURVES.glob("*.jsonl")} == set(EXPECTED)
    assert set().union(*EXPECTED.values()) == set(FINDINGS)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_remedy_can_be_typed_behind_the_command_it_is_for(name: str) -> None:
    overrides, _ = recorded(name)
    for remedy in {remedy for one in told_of(name) for remedy in one.finding.remedies}:
        configure(*overrides, *remedy.split())


def test_a_policy_that_breaks_is_told_of_within_ten_steps() -> None:
    assert [one.step for one in told_of("lr_large") if one.name == "policy_collapsed"] == [10]


def test_a_finding_says_its_figures_its_cause_and_overrides_in_two_lines() -> None:
    (one,) = told_of("beta_large")
    what, why = one.as_text().splitlines()
    assert what.startswith("warning  step 15  beta_too_large: the loss is 9.4, 14 times what knowing nothing costs")
    assert "loss.beta=50" in why and why.endswith("try loss.beta=5")
    assert one.as_row()["try"] == ["loss.beta=5"]


def test_the_documentation_explains_every_finding() -> None:
    titles = [line.removeprefix("### ").strip("`") for line in DOCS.read_text().splitlines() if line.startswith("### ")]
    assert sorted(titles) == sorted(FINDINGS)


# --- when something is told ------------------------------------------------------------------------------------------

CHOSEN = {"logps__chosen": -100.0, "rewards__rejected": -2.0}


def fallen(nats: float, count: int, first: int = 10) -> list[dict[str, Any]]:
    return lines(count, first=first, rewards__chosen=-3.0 * nats, **CHOSEN)


def test_a_finding_is_told_once_and_again_when_it_has_become_worse() -> None:
    rows = fallen(10, 6) + fallen(60, 6, first=70)
    assert [(one.step, one.finding.severity) for one in told(setup_of(), rows)] == [(30, NOTE), (90, WARNING)]


def test_a_finding_that_comes_back_is_told_again_but_not_when_it_only_flickers() -> None:
    away = fallen(10, 3) + fallen(0, 8, first=40) + fallen(10, 3, first=120)
    flickering = fallen(10, 3) + fallen(0, 3, first=40) + fallen(10, 3, first=70)
    assert [one.step for one in told(setup_of(), away)] == [30, 130]
    assert [one.step for one in told(setup_of(), flickering)] == [30]


@pytest.mark.parametrize("name", ["lr_large", "pdpo_away"])
def test_the_lines_alone_decide_so_a_repeated_beginning_leads_to_the_same_end(name: str) -> None:
    overrides, rows = recorded(name)
    whole = told_of(name)
    for cut in range(len(rows)):
        monitor = Monitor(setup_of(*overrides))
        before = [one for row in rows[:cut] for one in monitor.after(row)]
        assert before + [one for row in rows[cut:] for one in monitor.after(row)] == whole


def test_values_that_are_not_finite_are_no_evidence() -> None:
    overrides, rows = recorded("example")
    broken = [{name: value if name in ("step", "split") else None for name, value in row.items()} for row in rows]
    assert told(setup_of(*overrides), broken) == []


def test_what_a_run_began_with_and_its_latest_lines_are_all_that_is_kept() -> None:
    curves = Curves(lines(500, loss=1.0))
    assert len(curves.recent("loss")) == 40 and curves.opening("loss") == 1.0 and curves.steps(3) == 30


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_a_fall_is_measured_by_what_there_was_to_lose() -> None:
    assert [one.finding.severity for one in told(setup_of(), fallen(4, 3))] == []
    assert [one.finding.severity for one in told(setup_of(), fallen(6, 3))] == [NOTE]
    assert [one.finding.severity for one in told(setup_of(), fallen(51, 3))] == [WARNING]


def test_chosen_and_rejected_falling_alike_wants_a_stronger_pull_and_else_imitation() -> None:
    def remedies(rejected: float) -> tuple[str, ...]:
        rows = lines(3, logps__chosen=-10.0, rewards__chosen=-24.0, rewards__rejected=rejected)
        return told(setup_of(), rows)[0].finding.remedies

    assert remedies(-24.0)[0] == "loss.beta=9"
    assert remedies(-240.0)[0] == "loss.nll_alpha=1"


def test_accuracy_is_judged_on_a_thousand_pairs_after_warm_up() -> None:
    setup = setup_of("global_pairs=32", "optimizer.warmup_steps=10")
    coin = {"rewards__accuracies": 0.5, "rewards__margins": 0.3}
    assert told(setup, lines(6, every=5, **coin)) == []
    assert [one.name for one in told(setup, lines(12, every=5, **coin))] == ["accuracy_at_chance"]
    assert told(setup, lines(40, every=5, rewards__accuracies=0.02, rewards__margins=1e-7)) == []


def test_one_spike_is_a_note_and_three_are_a_warning() -> None:
    calm = lines(20, grad_norm=1.0)
    once = calm + lines(1, first=210, grad_norm=30.0) + lines(1, first=220, grad_norm=1.0)
    again = once + lines(2, first=230, grad_norm=40.0)
    assert [one.finding.severity for one in told(setup_of(), once)] == [NOTE]
    assert [one.finding.severity for one in told(setup_of(), again)] == [NOTE, WARNING]


def test_clipping_is_proposed_only_where_it_would_clip_more() -> None:
    rows = lines(20, grad_norm=5.0) + lines(1, first=210, grad_norm=80.0)
    (clipped,) = told(setup_of("optimizer.max_grad_norm=1.0"), rows)
    (free,) = told(setup_of("optimizer.max_grad_norm=null"), rows)
    assert free.finding.remedies[0] == "optimizer.max_grad_norm=5"
    assert not any("max_grad_norm" in remedy for remedy in clipped.finding.remedies)


def test_a_generator_whose_term_feeds_on_itself_is_an_alarm() -> None:
    began = lines(3, loss__generator=0.5, loss__dpo=0.5)
    (one, *_) = told(
        setup_of("loss=pdpo", "loss.gamma=1"), began + lines(8, first=40, loss__generator=40.0, loss__dpo=0.5)
    )
    assert (one.name, one.finding.severity) == ("generator_runs_away", ALARM)


def test_a_model_that_knows_nothing_has_no_language_to_lose() -> None:
    lost = [{"step": 0, "split": "eval", "mean_token_accuracy": 0.05}, *lines(5, mean_token_accuracy=0.01)]
    assert told(setup_of(), lost) == []
