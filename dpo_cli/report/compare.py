"""Several runs beside one another: what differs between them, what became of each, and their curves in one plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from dpo_cli.report import tables, words
from dpo_cli.report.charts import CHARTS, Chart
from dpo_cli.report.drawing import INK, MUTED, SERIES, Picture, drawn
from dpo_cli.report.figures import decided, legend, step_axis
from dpo_cli.report.pairs import Ranking
from dpo_cli.report.record import RunRecord, numbers
from dpo_cli.rollout.statistics import paired_difference

# More lines than colours in one plot are told apart by dashes, and beyond that by nothing.
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
# Of which charts, and whether what is held out is meant.
_OVERLAID = {
    "loss": True, "margin": True, "accuracy": True, "rewards": True, "logps": True, "task": True,
    "generator_kl": False, "generator_length": False, "entropy": True, "token_accuracy": True, "grad_norm": False,
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One run, with how it ranks held-out pairs where that was recorded."""

    run: RunRecord
    ranking: Ranking | None


def differing_settings(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A header of run names, then a row for each setting that is not the same in all."""
    flat = [dict(words.leaves(run.settings)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    table = [["setting", *names(runs)]]
    for key in keys:
        values = [words.plain(settings[key]) if key in settings else "–" for settings in flat]
        if len(set(values)) > 1:
            table.append([key, *values])
    return table


def names(runs: Sequence[RunRecord]) -> list[str]:
    """Names that tell runs apart: of the folder, with as much of its path as that takes."""
    found = [run.name for run in runs]
    return [name if found.count(name) == 1 else str(run.folder) for name, run in zip(found, runs, strict=True)]


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """What a legend says: the settings that differ, where they are few, else the name."""
    table = differing_settings(runs)[1:]
    if 1 <= len(table) <= 2:
        found = [
            ", ".join(f"{row[0].rpartition('.')[2]}={row[place + 1]}" for row in table) for place in range(len(runs))
        ]
        if len(set(found)) == len(found) and max(map(len, found)) <= 40:
            return found
    return names(runs)


def outcome_table(compared: Sequence[Compared]) -> list[list[str]]:
    """A row a run: the settings that differ first, then what it came to."""
    runs = [each.run for each in compared]
    settings = differing_settings(runs)[1:]
    shown = settings if len(settings) <= 4 else []
    head = [
        "run",
        *(row[0] for row in shown),
        "reward accuracy",
        "95% interval",
        "loss",
        "margin",
        "log-prob of chosen",
        "of rejected",
        "task gain",
        "95% interval",
        "steps",
        "findings",
    ]
    table = [head]
    for place, (name, each) in enumerate(zip(names(runs), compared, strict=True)):
        run = each.run
        accuracy, difference = tables.accuracy_of(run, each.ranking), tables.task_difference(run)
        found = sorted({str(finding["name"]) for finding in run.findings if finding["severity"] != "note"})
        table.append(
            [
                name,
                *(row[place + 1] for row in shown),
                "" if accuracy is None else f"{accuracy.value:.1%}",
                "" if accuracy is None else words.interval(accuracy),
                _last(run, "loss"),
                _last(run, "rewards/margins"),
                _change(run, "logps/chosen"),
                _change(run, "logps/rejected"),
                "" if difference is None else f"{words.points(difference.gain)} points",
                "" if difference is None else f"{words.points(difference.low)} to {words.points(difference.high)}",
                f"{run.steps:,}" + ("" if run.ended else ", unfinished"),
                ", ".join(found),
            ]
        )
    filled = [column for column in range(len(head)) if any(row[column] for row in table[1:])]
    return [[row[column] for column in filled] for row in table]


def _last(run: RunRecord, metric: str) -> str:
    found = list(numbers(run.evaluations or run.train, metric))
    return words.number(found[-1][1]) if found else ""


def _change(run: RunRecord, metric: str) -> str:
    found = list(numbers(run.evaluations, metric))
    return f"{found[-1][1] - found[0][1]:+.3g}".replace("-", "−") if len(found) > 1 else ""


def overlaid(runs: Sequence[RunRecord]) -> list[Picture]:
    """The held-out curves of all runs, of training where nothing was held out."""
    pictures = []
    for chart in CHARTS:
        if chart.name not in _OVERLAID:
            continue
        for number, curve in enumerate(chart.curves):
            title = f"{chart.title}, {curve.label}" if curve.label else chart.title
            name = chart.name if len(chart.curves) == 1 else f"{chart.name}_{number}"
            picture = _overlaid(runs, chart, curve.metric, name, title, held_out=_OVERLAID[chart.name])
            pictures += [] if picture is None else [picture]
    return pictures


def _overlaid(
    runs: Sequence[RunRecord], chart: Chart, metric: str, name: str, title: str, *, held_out: bool
) -> Picture | None:
    scale = 100.0 if chart.percent else 1.0
    # One split for all, so that equal heights mean the same.
    splits = [run.evaluations for run in runs], [run.train for run in runs]
    evaluated = any(list(numbers(rows, metric)) for rows in splits[0]) and held_out
    lines = [
        [(step, scale * value) for step, value in numbers(decided(rows, metric), metric)]
        for rows in splits[0 if evaluated else 1]
    ]
    if sum(bool(line) for line in lines) < 2:
        return None

    def draw(axes: Axes) -> None:
        for place, (label, points) in enumerate(zip(labels(runs), lines, strict=True)):
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=SERIES[place % len(SERIES)], label=label,
                    linestyle=_DASHES[place // len(SERIES) % len(_DASHES)], marker="o" if len(points) < 15 else None,
                )  # fmt: skip
        step_axis(axes)
        if chart.percent:
            axes.yaxis.set_major_formatter("{x:g}%")
        if len(runs) <= 12:
            legend(axes, columns=1 if max(map(len, labels(runs))) > 22 else 2 if len(runs) != 3 else 3)

    table: list[list[object]] = [["run", "step", metric]]
    table += [
        [run, step, value / scale] for run, points in zip(names(runs), lines, strict=True) for step, value in points
    ]
    legend_rows = len(runs) if max(map(len, labels(runs))) > 22 else -(-len(runs) // (3 if len(runs) == 3 else 2))
    text = f"{chart.text} {'Held out.' if evaluated else 'Training.'}".strip()
    return drawn(name, title, text, draw, table, height=220 + 14 * (legend_rows if len(runs) <= 12 else 0))


def accuracies(compared: Sequence[Compared]) -> Picture | None:
    """Held-out accuracy of each run with its interval."""
    known = [
        (label, tables.accuracy_of(each.run, each.ranking))
        for label, each in zip(labels([each.run for each in compared]), compared, strict=True)
    ]
    found = [(label, estimate) for label, estimate in known if estimate is not None]
    if len(found) < 2:
        return None

    def draw(axes: Axes) -> None:
        for place, (_, each) in enumerate(found):
            bounds = [[100 * (each.value - each.low)], [100 * (each.high - each.value)]]
            axes.errorbar(
                100 * each.value,
                place,
                xerr=bounds,
                fmt="o",
                color=SERIES[place % len(SERIES)],
                markersize=6,
                capsize=3,
            )
        axes.set_yticks(range(len(found)), [label for label, _ in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.xaxis.set_major_formatter("{x:g}%")
        axes.grid(visible=False, axis="y")

    table: list[list[object]] = [["run", "reward accuracy", "low", "high"]]
    table += [[label, each.value, each.low, each.high] for label, each in found]
    text = "At the end, with 95% intervals (Wilson). They speak of other pairs of the same kind, not of other seeds."
    return drawn("accuracies", "Held-out reward accuracy", text, draw, table, height=max(150, 62 + 26 * len(found)))


def trade_off(compared: Sequence[Compared]) -> Picture | None:
    """What accuracy costs: how far chosen responses have fallen or risen for it."""
    points = []
    for label, each in zip(labels([each.run for each in compared]), compared, strict=True):
        accuracy = tables.accuracy_of(each.run, each.ranking)
        logps = list(numbers(each.run.evaluations, "logps/chosen"))
        if accuracy is not None and len(logps) > 1:
            points.append((label, logps[-1][1] - logps[0][1], 100 * accuracy.value))
    if len(points) < 2:
        return None

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=":")
        for place, (label, change, accuracy) in enumerate(points):
            axes.plot(change, accuracy, "o", color=SERIES[place % len(SERIES)], markersize=8)
            axes.annotate(
                label,
                (change, accuracy),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=INK,
            )
        axes.margins(0.2)
        axes.set_xlabel("change of log-prob of chosen, in nats")
        axes.yaxis.set_major_formatter("{x:g}%")

    table: list[list[object]] = [["run", "change of log-prob of chosen", "reward accuracy"]]
    table += [[label, change, accuracy / 100] for label, change, accuracy in points]
    text = "Held out, at the end. Left of zero, chosen responses have become less likely than they were."
    return drawn("trade_off", "What accuracy costs", text, draw, table)


def same_pairs(compared: Sequence[Compared]) -> bool:
    """Whether all runs were evaluated on the same pairs."""
    pairs = [each.run.pairs for each in compared]
    texts = [
        None if each is None else [(row.get("chosen"), row.get("rejected")) for row in each.identities]
        for each in pairs
    ]
    return texts[0] is not None and all(text == texts[0] for text in texts)


def paired_table(compared: Sequence[Compared]) -> list[list[str]]:
    """Each run against the first on the same held-out pairs."""
    rankings = [each.ranking for each in compared]
    if not same_pairs(compared) or rankings[0] is None:
        return []
    first, found = rankings[0].right[-1], names([each.run for each in compared])
    table = [
        ["run", f"right where {found[0]} is wrong", "wrong where it is right", "accuracy gain, points", "95% interval"]
    ]
    for name, ranking in zip(found[1:], rankings[1:], strict=True):
        if ranking is not None:
            right = ranking.right[-1]
            difference = paired_difference(first, right)
            interval = f"{words.points(difference.low)} to {words.points(difference.high)}"
            table.append(
                [
                    name,
                    f"{(right & ~first).sum():,}",
                    f"{(first & ~right).sum():,}",
                    words.points(difference.gain),
                    interval,
                ]
            )
    return table


def wrong_in_all(compared: Sequence[Compared], count: int) -> tuple[int, list[int]]:
    """How many pairs every run ranks wrong at the end, and those with the lowest margins: labels to look at first."""
    rankings = [each.ranking for each in compared if each.ranking is not None]
    if len(rankings) < 2 or len(rankings) < len(compared) or not same_pairs(compared):
        return 0, []
    wrong = np.logical_and.reduce([ranking.margins[-1] < 0 for ranking in rankings])
    # Margins of different losses have different scales: places in each run's order are added instead.
    places = sum(np.argsort(np.argsort(ranking.margins[-1])) for ranking in rankings)
    worst = [int(pair) for pair in np.argsort(places) if wrong[pair]]
    return len(worst), worst[:count]
