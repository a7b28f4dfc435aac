"""The results of the PDPO experiment as docs/pdpo_results.json and as the tables of docs/pdpo_results.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pdpo_runs import Row
from pdpo_studies import STUDIES

BEGIN, END = "<!-- tables: scripts/experiments/pdpo.py -->", "<!-- end of tables -->"
VERSIONS = ("torch", "transformers", "numpy")
TRIED = ("steps", "pairs_per_step", "pairs", "base")
METHODS = {
    "base": "base",
    "sft": "SFT on the chosen answers",
    "dpo_all": "DPO, all pairs",
    "dpo": "DPO, discriminator's pairs",
    "dpo_nll": "DPO + NLL, all pairs",
    "hinge": "PDPO hinge",
    "unhinged": "PDPO unhinged",
    "policy_gradient": "PDPO policy gradient",
}


@dataclass(frozen=True)
class Setting:
    """What was run on several seeds. `rows` is by seed."""

    method: str
    beta: float | None
    gamma: float | None
    learning_rate: float
    options: tuple[str, ...]
    rows: dict[int, Row]

    @property
    def label(self) -> str:
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        rate = f", lr {self.learning_rate:g}" if self.method == "sft" else ""
        return METHODS[self.method] + gamma + rate + "".join(map(_shown, self.options))

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows.values() if row.get(name) is not None]


def _shown(option: str) -> str:
    """Without the group of its key; a generator with prompts of its own takes none of the pairs', which goes unsaid."""
    key, _, value = option.partition("=")
    return "" if key == "data.generator_fraction" else f", {key.rpartition('.')[2]}={value}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, NaN of one seed."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        return cls(float(np.mean(values)), float(error))


def settings_of(rows: Iterable[Row], *, split: str) -> list[Setting]:
    """The settings of a split, in the order of METHODS, with their seeds gathered."""
    found: dict[tuple[Any, ...], Setting] = {}
    for row in rows:
        if row["split"] == split:
            key = (row["method"], row["beta"], row["gamma"], row["learning_rate"], tuple(row["options"]))
            found.setdefault(key, Setting(*key, rows={})).rows[row["seed"]] = row
    order = list(METHODS)
    return sorted(
        found.values(), key=lambda s: (order.index(s.method), s.gamma or 0, s.learning_rate, s.options, s.beta or 0)
    )


def find(settings: Iterable[Setting], method: str, beta: float | None) -> Setting | None:
    """The setting of a method that has neither gamma nor options."""
    for setting in settings:
        if (setting.method, setting.beta, setting.gamma, setting.options) == (method, beta, None, ()):
            return setting
    return None


def paired(setting: Setting, other: Setting | None) -> Estimate | None:
    """By how much the exact match exceeds that of another setting, seed by seed."""
    if other is None:
        return None
    seeds = setting.rows.keys() & other.rows.keys()
    gains = [setting.rows[seed]["exact_match"] - other.rows[seed]["exact_match"] for seed in sorted(seeds)]
    return Estimate.of(gains) if gains else None


def write_tables(rows: Sequence[Row], docs: Path) -> None:
    """docs/pdpo_results.json anew, and what stands between the markers of docs/pdpo_results.md."""
    told = {
        "machine": {"processor": processor(), "system": platform.system(), "python": platform.python_version()},
        "versions": {name: version(name) for name in VERSIONS},
        "results": [{name: value for name, value in row.items() if name != "key"} for row in rows],
    }
    lines = [json.dumps(row) for row in told.pop("results")]
    head = json.dumps(told, indent=1)[:-2]
    docs.mkdir(parents=True, exist_ok=True)
    text = f'{head},\n "results": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    (docs / "pdpo_results.json").write_text(text, encoding="utf-8")
    page = docs / "pdpo_results.md"
    before, after = "", ""
    if page.exists():
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{tables(rows)}{END}{after}", encoding="utf-8")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def tables(rows: Sequence[Row]) -> str:
    parts = []
    for study in STUDIES.values():
        its = [row for row in rows if study.owns(row)]
        tests, tuning = settings_of(its, split="test"), settings_of(its, split="validation")
        grid = [setting for setting in tuning if not setting.options]
        extra = [setting for setting in tuning if setting.options]
        for title, settings, table in (
            ("test seeds, test problems", tests, test_table(tests)),
            ("the grid, gain over the base", grid, grid_table(grid)),
            ("the grid, everything measured", grid, detail_table(grid)),
            ("single questions", extra, extra_table(extra, grid)),
        ):
            parts += [(f"{study.title}: {title}", table)] if settings else []
    trials = [row for row in rows if not any(study.owns(row) for study in STUDIES.values())]
    parts += [("Before the grids: other sizes", trial_table(trials))] if trials else []
    return "".join(f"\n### {title}\n\n{table}" for title, table in parts)


def test_table(settings: Sequence[Setting]) -> str:
    head = ["beta", "method", "exact match", "against base", "against DPO, same pairs", *(each for each, _ in DETAILS)]
    body = []
    seeds = max((len(setting.rows) for setting in settings), default=0)
    for beta in (None, *sorted({setting.beta for setting in settings if setting.beta is not None}, reverse=True)):
        for setting in (setting for setting in settings if setting.beta == beta):
            base = None if setting.method == "base" else find(settings, "base", None)
            dpo = None if beta is None or setting.method == "dpo" else find(settings, "dpo", beta)
            match = Estimate.of(setting.values("exact_match"))
            gains = [signed(paired(setting, other)) for other in (base, dpo)]
            plain = f"{100 * match.mean:.1f}{plus_minus(match)}"
            missing = "" if len(setting.rows) == seeds else f" ({len(setting.rows)} of {seeds} seeds)"
            body.append([number(beta), setting.label + missing, plain, *gains, *(tell(setting) for _, tell in DETAILS)])
    return markdown(head, body)


def grid_table(settings: Sequence[Setting]) -> str:
    """Points over the base of the same seed: the mean, and in brackets each seed's where there are several."""
    betas = sorted({setting.beta for setting in settings if setting.beta is not None})
    base = find(settings, "base", None)
    by_label: dict[str, dict[float | None, str]] = {}
    for setting in settings:
        if setting.method != "base" and base is not None:
            gains = [row["exact_match"] - base.rows[seed]["exact_match"] for seed, row in sorted(setting.rows.items())]
            each = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
            mean = f"{100 * np.mean(gains):+.1f} ({each})" if len(gains) > 1 else each
            by_label.setdefault(setting.label, {})[setting.beta] = mean
    body = [
        # Imitation knows no beta.
        [label, *(cells.get(beta, cells.get(None, "not run")) for beta in betas)]
        for label, cells in by_label.items()
    ]
    return markdown(["method", *(f"beta {beta:g}" for beta in betas)], body)


def detail_table(settings: Sequence[Setting]) -> str:
    head = ["method", "beta", "exact match", *(name for name, _ in DETAILS)]
    body = [
        [
            setting.label,
            number(setting.beta),
            f"{100 * np.mean(setting.values('exact_match')):.1f}",
            *(tell(setting) for _, tell in DETAILS),
        ]
        for setting in settings
    ]
    return markdown(head, body)


def extra_table(extra: Sequence[Setting], grid: Sequence[Setting]) -> str:
    head = ["beta", "method", "exact match", "against the same without it", *(name for name, _ in DETAILS)]
    plain = {(setting.method, setting.beta, setting.gamma): setting for setting in grid}
    body = []
    for setting in sorted(extra, key=lambda setting: setting.beta or 0):
        gain = paired(setting, plain.get((setting.method, setting.beta, setting.gamma)))
        match = f"{100 * np.mean(setting.values('exact_match')):.1f}"
        told = [tell(setting) for _, tell in DETAILS]
        body.append([number(setting.beta), setting.label, match, signed(gain), *told])
    return markdown(head, body)


def trial_table(rows: Sequence[Row]) -> str:
    head = ["seed", "method", "beta", "lr", *TRIED, "exact match", "chosen, nats"]
    body = []
    for row in rows:
        label = METHODS[row["method"]] + ("" if row["gamma"] is None else f", gamma {row['gamma']:g}")
        settled = [str(row[name]) for name in TRIED]
        change = row.get("chosen_change")
        measured = [f"{100 * row['exact_match']:.1f}", "" if change is None else f"{change:+.2f}"]
        body.append([str(row["seed"]), label, number(row["beta"]), f"{row['learning_rate']:g}", *settled, *measured])
    return markdown(head, body)


def average(name: str, shape: str, scale: float = 1.0) -> Callable[[Setting], str]:
    def tell(setting: Setting) -> str:
        values = setting.values(name)
        return shape.format(scale * np.mean(values)) if values else ""

    return tell


DETAILS: tuple[tuple[str, Callable[[Setting], str]], ...] = (
    ("tokens", average("tokens", "{:.1f}")),
    ("ended", average("ended", "{:.1f}%", 100)),
    ("reward accuracy", average("reward_accuracy", "{:.1f}%", 100)),
    ("margin", average("reward_margin", "{:.2f}")),
    ("chosen, nats", average("chosen_change", "{:+.2f}")),
    ("rejected, nats", average("rejected_change", "{:+.2f}")),
    ("active", average("generator_active_fraction", "{:.0f}%", 100)),
    ("CPU s", average("train_cpu_seconds", "{:.0f}")),
)


def signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{100 * estimate.mean:+.1f}{plus_minus(estimate)}"


def plus_minus(estimate: Estimate) -> str:
    return "" if np.isnan(estimate.error) else f" ± {100 * estimate.error:.1f}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
