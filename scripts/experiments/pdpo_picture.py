"""The results of the PDPO experiment as docs/pdpo_*.svg and docs/pdpo_*.png: accuracy by gamma, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pdpo_runs import Row
from pdpo_studies import Study
from pdpo_table import METHODS, Estimate, Setting, find, paired, settings_of

# Okabe and Ito's palette: told apart by eyes of every kind. Each method also has a shape or a dash of its own.
LINES = {"base": ("#000000", ":"), "dpo": ("#0072B2", "-"), "dpo_all": ("#56B4E9", "--"), "dpo_nll": ("#009E73", "-.")}
POINTS = {"hinge": ("#D55E00", "o"), "unhinged": ("#CC79A7", "s"), "policy_gradient": ("#E69F00", "^")}


def draw(study: Study, rows: Sequence[Row], docs: Path) -> None:
    """A study's test seeds, or its grid while there are none; no picture where nothing has been run.

    A column a beta, each on scales of its own; above the gain, below what became of the chosen responses.
    """
    rows = [row for row in rows if study.owns(row)]
    if not rows:
        return
    split = "test" if any(row["split"] == "test" for row in rows) else "validation"
    settings = [setting for setting in settings_of(rows, split=split) if not setting.options]
    # What a stop left behind with one seed of several is told in the table alone.
    most = max(len(setting.rows) for setting in settings)
    settings = [setting for setting in settings if len(setting.rows) > most / 2]
    betas = sorted({setting.beta for setting in settings if setting.beta is not None})
    gammas = sorted({setting.gamma for setting in settings if setting.gamma is not None})
    mpl.rcParams.update(
        {"font.size": 10, "svg.hashsalt": study.pairs, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = Figure(figsize=(3.2 * len(betas) + 1.2, 6.6), layout="constrained")
    grid = figure.subplots(2, len(betas), sharex=True, squeeze=False)
    for column, beta in enumerate(betas):
        upper, lower = grid[:, column]
        upper.set_title(f"beta = {beta:g}")
        panel(upper, settings, beta, lambda setting: gain(setting, settings))
        panel(lower, settings, beta, change)
        lower.set_xlabel("gamma, the generator's weight")
        lower.set_xscale("log")
        lower.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
        lower.set_xlim(gammas[0] / 1.35, gammas[-1] * 1.35)
        lower.minorticks_off()
    grid[0, 0].set_ylabel("exact match, points over the base")
    grid[1, 0].set_ylabel("change of log p(chosen), nats")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    docs.mkdir(parents=True, exist_ok=True)
    # Without a date the same results give the same file.
    figure.savefig(docs / f"pdpo_{study.pairs}.svg", metadata={"Date": None})
    figure.savefig(docs / f"pdpo_{study.pairs}.png", dpi=110, metadata={"Software": None})


def gain(setting: Setting, settings: Sequence[Setting]) -> Estimate | None:
    """In points: bases differ more than methods do, so each seed is compared with its own."""
    difference = paired(setting, find(settings, "base", None))
    return None if difference is None else Estimate(100 * difference.mean, 100 * difference.error)


def change(setting: Setting) -> Estimate | None:
    if setting.method == "base":
        return Estimate(0.0, float("nan"))
    values = setting.values("chosen_change")
    return Estimate.of(values) if values else None


def panel(axes: Axes, settings: Sequence[Setting], beta: float, measure: Callable[[Setting], Estimate | None]) -> None:
    """What does not know gamma is a level line, shaded by its standard error; PDPO's generators are points."""
    axes.grid(axis="y", alpha=0.25)
    for method, (colour, dashes) in LINES.items():
        setting = find(settings, method, None if method == "base" else beta)
        found = None if setting is None else measure(setting)
        if found is None:
            continue
        axes.axhline(found.mean, color=colour, linestyle=dashes, label=METHODS[method], linewidth=1.6)
        if not np.isnan(found.error) and found.error:
            axes.axhspan(found.mean - found.error, found.mean + found.error, color=colour, alpha=0.10, linewidth=0)
    for place, (method, (colour, shape)) in enumerate(POINTS.items()):
        told = [
            (setting.gamma, estimate.mean, estimate.error)
            for setting in settings
            if (setting.method, setting.beta) == (method, beta) and setting.gamma is not None
            if (estimate := measure(setting)) is not None
        ]
        if told:
            gammas, means, errors = np.array(sorted(told)).T
            # Beside each other where they share a gamma.
            axes.errorbar(
                gammas * 1.1 ** (place - 1), means, yerr=np.nan_to_num(errors), color=colour, marker=shape,
                label=METHODS[method], capsize=2.5, linewidth=1.4, markersize=5.5,
            )  # fmt: skip
