"""The figures of one run's metrics and pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dpo_cli.report.charts import CHARTS, Chart, one
from dpo_cli.report.drawing import CHOSEN, INK, LINE, MUTED, REJECTED, Picture, drawn
from dpo_cli.report.pairs import Ranking
from dpo_cli.report.record import Row, RunRecord, numbers
from dpo_cli.rollout.statistics import Estimate, wilson

# Drawn with others, of no shape, or in the tables.
_NOT_DRAWN = {"step", "epoch", "num_tokens", "perf/data_loading_pct", "perf/sampling_pct", "generator/staleness"}


def curves_of(run: RunRecord) -> list[Picture]:
    """Every metric of the run over its steps: those of CHARTS, then whatever else is a number."""
    known = {curve.metric for chart in CHARTS for curve in chart.curves}
    names = dict.fromkeys(
        name for row in (*run.train, *run.evaluations) for name, value in row.items() if isinstance(value, int | float)
    )
    others = [
        one(f"metric_{place}", name, "", name, INK)
        for place, name in enumerate(name for name in names if name not in known | _NOT_DRAWN)
    ]
    charts = (_chart(run, chart) for chart in (*CHARTS, *others))
    return [picture for picture in charts if picture is not None]


def _chart(run: RunRecord, chart: Chart) -> Picture | None:
    held_out = run.held_out_examples
    scale = 100.0 if chart.percent else 1.0
    lines = [
        (curve, split, [(step, scale * value) for step, value in numbers(decided(rows, curve.metric), curve.metric)])
        for curve in chart.curves
        for split, rows in (("training", run.train), ("held out", run.evaluations))
    ]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    both = len({split for _, split, _ in lines}) > 1
    several = len({curve.label for curve, _, _ in lines}) > 1

    def draw(axes: Axes) -> None:
        for curve, split, points in lines:
            label = " ".join(part for part in (curve.label, split if both else "") if part)
            evaluated = split == "held out"
            axes.plot(
                *zip(*points, strict=True), color=curve.color, label=label, linewidth=1.9 if evaluated else 1.1,
                linestyle="-" if evaluated or not both else (0, (4, 1.5)), alpha=1 if evaluated or not both else 0.75,
                marker="o" if evaluated or len(points) == 1 else None, markevery=max(1, len(points) // 12),
            )  # fmt: skip
            if evaluated and curve.metric == "rewards/accuracies" and held_out:
                bounds = [wilson(round(value / 100 * held_out), held_out) for _, value in points]
                axes.fill_between(
                    [step for step, _ in points], [100 * bound.low for bound in bounds],
                    [100 * bound.high for bound in bounds], color=curve.color, alpha=0.15, linewidth=0,
                )  # fmt: skip
        step_axis(axes)
        if chart.percent:
            axes.yaxis.set_major_formatter("{x:g}%")
        if chart.log and all(value > 0 for _, _, points in lines for _, value in points):
            _log_axis(axes, [value for _, _, points in lines for _, value in points])
        if both or several:
            legend(axes, columns=2)

    table = [["step", "split", "metric", "value"]]
    table += [
        [str(step), split, curve.metric, repr(value / scale)]
        for curve, split, points in lines
        for step, value in points
    ]
    text = chart.text
    if chart.name == "accuracy" and held_out:
        text += " Band: 95% interval, held out."
        text += " At the start no pair has a margin." if any(map(undecided, run.evaluations)) else ""
    return drawn(chart.name, chart.title, text, draw, table)


def decided(rows: Sequence[Row], metric: str) -> Sequence[Row]:
    """Without the lines whose accuracy is rounding: a policy that equals its reference has margins of zero."""
    if metric != "rewards/accuracies":
        return rows
    return [row for row in rows if not undecided(row)]


def undecided(row: Row) -> bool:
    """Whether no pair had a margin yet."""
    margin, chosen = row.get("rewards/margins"), row.get("rewards/chosen")
    return all(isinstance(value, int | float) and abs(value) < 1e-5 for value in (margin, chosen))


def step_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    # A decade or less reads better on a plain axis.
    if max(values) / min(values) > 10:
        axes.set_yscale("log")


def legend(axes: Axes, *, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.6, columnspacing=1.2
    )


def pairs_of(ranking: Ranking) -> list[Picture]:
    """What the means hide: margins, sources, lengths, and when pairs are learnt and lost."""
    # Before the first step all margins are zero.
    pictures = [_margins(ranking)] if ranking.margins[-1].any() else []
    pictures.append(_preference(ranking))
    pictures += [_fates(ranking)] if len(ranking.margins) > 2 else []
    sources = ranking.by_source()
    pictures += (
        [_shares("sources", "Accuracy by source", "Held-out pairs at the end, with 95% intervals (Wilson).", sources)]
        if len(sources) > 1
        else []
    )
    pictures.append(
        _shares("lengths", "Accuracy by length difference",
                "Tokens of the chosen response less those of the rejected one, in groups of about the same size: "
                "a slope says that length is being learnt.", ranking.by_length_difference())
    )  # fmt: skip
    return pictures


def _bins(*values: np.ndarray) -> np.ndarray:
    whole = np.concatenate([each[np.isfinite(each)] for each in values])
    low, high = np.quantile(whole, [0.005, 0.995]) if len(whole) else (-1.0, 1.0)
    reach = max(abs(low), abs(high), 1e-6)
    # Bins meet at zero, so that no bar holds right and wrong pairs; of values that lie close together and far from zero
    # they are no narrower than lets them be counted.
    width = max(high - low or 2 * reach, reach / 10) / 28
    first, last = np.floor(min(low, 0) / width), np.ceil(max(high, 0) / width)
    return np.arange(first, max(last, first + 1) + 1) * width


def _counts(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Of each bin; what lies beyond all of them counts in the outermost."""
    found: np.ndarray = np.histogram(np.clip(values[np.isfinite(values)], bins[0], bins[-1]), bins)[0]
    return found


def _margins(ranking: Ranking) -> Picture:
    start, end = ranking.margins[0], ranking.margins[-1]
    at_zero = float(np.nanmax(np.abs(start), initial=0)) < 1e-2 * float(np.nanmax(np.abs(end), initial=0) or 1)
    bins = _bins(end) if at_zero else _bins(start, end)
    counts_start, counts_end = (_counts(each, bins) for each in (start, end))

    def draw(axes: Axes) -> None:
        middle, width = (bins[:-1] + bins[1:]) / 2, bins[1] - bins[0]
        for name, side, color in (("right", middle > 0, CHOSEN), ("wrong", middle < 0, REJECTED)):
            axes.bar(middle[side], counts_end[side], width * 0.92, color=color, alpha=0.85, label=f"{name}, end")
        if at_zero:
            axes.axvline(0, color=INK, linewidth=1.4, label="all, start")
        elif len(ranking.margins) > 1:
            axes.stairs(counts_start, bins, color=INK, linewidth=1.2, label="start")
        axes.set_xlabel(ranking.by)
        axes.set_ylabel("pairs")
        legend(axes, columns=3)

    table: list[list[object]] = [["from", "to", "pairs at the start", "pairs at the end"]]
    table += [list(row) for row in zip(bins[:-1], bins[1:], counts_start, counts_end, strict=True)]
    text = f"Held-out pairs at step {ranking.pairs.steps[-1]:,}. The outermost bars hold what lies beyond."
    return drawn("margins", "Margins, start and end", text, draw, table)


def _preference(ranking: Ranking) -> Picture:
    pairs = ranking.pairs
    start, end = pairs.chosen[0] - pairs.rejected[0], pairs.chosen[-1] - pairs.rejected[-1]
    bins = _bins(start, end)
    counts = [_counts(each, bins) for each in (start, end)]
    shares = [float((each > 0).mean()) for each in (start, end)]

    def draw(axes: Axes) -> None:
        axes.stairs(counts[0], bins, color=MUTED, fill=True, alpha=0.35, label=f"start: {shares[0]:.0%} above 0")
        axes.stairs(counts[1], bins, color=CHOSEN, linewidth=1.8, label=f"end: {shares[1]:.0%} above 0")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("log policy(chosen) − log policy(rejected), in nats")
        axes.set_ylabel("pairs")
        legend(axes, columns=2)

    table: list[list[object]] = [["from", "to", "pairs at the start", "pairs at the end"]]
    table += [list(row) for row in zip(bins[:-1], bins[1:], *counts, strict=True)]
    text = (
        "Without the reference: which of the two the policy itself would rather write. A pair may have a margin and "
        "not have turned round."
    )
    return drawn("preference", "What the policy would rather write", text, draw, table)


def _fates(ranking: Ranking) -> Picture:
    right, steps = ranking.right, ranking.pairs.steps
    won = (~right[:-1] & right[1:]).sum(1)
    lost = (right[:-1] & ~right[1:]).sum(1)
    places = np.arange(len(won))

    def draw(axes: Axes) -> None:
        axes.bar(places, won, 0.8, color=CHOSEN, alpha=0.85, label="newly right")
        axes.bar(places, -lost, 0.8, color=REJECTED, alpha=0.85, label="lost again")
        axes.axhline(0, color=LINE, linewidth=0.8)
        shown = places[:: max(1, len(places) // 6)]
        axes.set_xticks(shown, [f"{steps[place + 1]:,}" for place in shown])
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_xlabel("evaluation at step")
        axes.set_ylabel("pairs")
        legend(axes, columns=2)

    table: list[list[object]] = [["step", "newly right", "lost again"]]
    table += [[int(step), int(more), int(less)] for step, more, less in zip(steps[1:], won, lost, strict=True)]
    text = (
        "Held-out pairs that changed sides since the evaluation before. Where as many are lost as won, the run has "
        "stopped learning pairs and trades them."
    )
    return drawn("fates", "Pairs won and lost", text, draw, table)


def _shares(name: str, title: str, text: str, groups: Sequence[tuple[str, Estimate, int]]) -> Picture:
    def draw(axes: Axes) -> None:
        estimates = [estimate for _, estimate, _ in groups]
        values = [100 * each.value for each in estimates]
        below = [100 * (each.value - each.low) for each in estimates]
        above = [100 * (each.high - each.value) for each in estimates]
        places = range(len(groups))
        axes.axvline(50, color=MUTED, linewidth=0.8, linestyle=":")
        axes.errorbar(
            values, places, xerr=(below, above), fmt="o", color=CHOSEN, markersize=6, elinewidth=1.6, capsize=3
        )
        axes.set_yticks(places, [f"{_short(label)}  ({count:,})" for label, _, count in groups])
        axes.invert_yaxis()
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.set_xlim(min(45, *(each.low * 100 - 3 for each in estimates)), 101)
        axes.xaxis.set_major_formatter("{x:g}%")
        axes.grid(visible=False, axis="y")

    table: list[list[object]] = [["group", "pairs", "accuracy", "low", "high"]]
    table += [[label, count, each.value, each.low, each.high] for label, each, count in groups]
    return drawn(name, title, text, draw, table, height=max(150, 62 + 26 * len(groups)))


def _short(text: str, most: int = 28) -> str:
    """Both ends of a name that is too long: files of one data set differ at either."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


def sparkline(values: Iterator[float] | Sequence[float]) -> str:
    """A polyline's points in a box of 100 by 24, zero included; empty where there is no line."""
    found = np.array([value for value in values if np.isfinite(value)])
    if len(found) < 2:
        return ""
    low, high = min(found.min(), 0), max(found.max(), 0)
    heights = 22 - 20 * (found - low) / (high - low or 1)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(np.linspace(2, 98, len(found)), heights, strict=True))
