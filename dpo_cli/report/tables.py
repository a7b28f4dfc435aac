"""What a run came to, in tables: plain data for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.shipped import GROUPS
from dpo_cli.durations import in_words
from dpo_cli.errors import DpoError
from dpo_cli.report.figures import undecided
from dpo_cli.report.pairs import Ranking
from dpo_cli.report.record import RunRecord, is_number, numbers
from dpo_cli.report.words import (
    interval,
    leaves,
    loss_in_words,
    number,
    plain,
    points,
    reference_in_words,
    share_of,
    sources,
)
from dpo_cli.rollout.statistics import Difference, Estimate, paired_difference, wilson

_SOFTWARE = ("dpo-cli", "torch", "transformers", "deepspeed", "python")
_NAMES = {
    "loss": "loss", "rewards/margins": "reward margin", "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected", "logps/chosen": "log-prob of chosen, nats",
    "logps/rejected": "log-prob of rejected, nats", "entropy": "entropy, nats a token",
    "mean_token_accuracy": "token accuracy",
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


def accuracy_of(run: RunRecord, ranking: Ranking | None) -> Estimate | None:
    """Held-out reward accuracy at the end with its interval: of all pairs as evaluated, else of those recorded.

    None where it is not known, and where no pair has a margin yet.
    """
    if run.evaluations and undecided(run.evaluations[-1]):
        return None
    found = list(numbers(run.evaluations, "rewards/accuracies"))
    count = run.held_out_examples
    if found and count is not None and 0 <= found[-1][1] <= 1:
        return wilson(round(found[-1][1] * count), count)
    return None if ranking is None or not ranking.by.startswith("reward") else ranking.accuracy()


def task_difference(run: RunRecord) -> Difference | None:
    before, after = run.task.get("before"), run.task.get("after")
    if before is None or after is None or len(before) != len(after):
        return None
    return paired_difference(np.array(before, dtype=bool), np.array(after, dtype=bool))


def tiles(run: RunRecord, ranking: Ranking | None) -> list[Tile]:
    found = []
    accuracy = accuracy_of(run, ranking)
    if accuracy is not None:
        found.append(Tile("held-out reward accuracy", f"{accuracy.value:.1%}", f"95%: {interval(accuracy)}"))
    difference = task_difference(run)
    if difference is not None:
        found.append(
            Tile("task accuracy", f"{difference.after_mean:.1%}",
                 f"{difference.before_mean:.1%} before; gain {points(difference.gain)}, "
                 f"95%: {points(difference.low)} to {points(difference.high)} points")
        )  # fmt: skip
    elif "before" in run.task:
        before = run.task["before"]
        estimate = wilson(sum(map(bool, before)), len(before))
        found.append(Tile("task accuracy before training", f"{estimate.value:.1%}", f"95%: {interval(estimate)}"))
    rows = run.evaluations or run.train
    where = "held-out" if run.evaluations else "training"
    for metric, label in (("loss", "loss"), ("rewards/margins", "reward margin")):
        values = list(numbers(rows, metric))
        if values:
            start = f"{number(values[0][1])} at step {values[0][0]:,}" if len(values) > 1 else ""
            found.append(Tile(f"{where} {label}", number(values[-1][1]), start))
    seconds = training_seconds(run)
    if seconds:
        found.append(Tile("training time", in_words(seconds), f"{run.steps:,} steps, without evaluation and saving"))
    return found


def training_seconds(run: RunRecord) -> float:
    """What the steps took: tokens over their throughput, line by line; a run that was resumed counts each step once."""
    total, before = 0.0, 0.0
    for row in run.train:
        tokens, speed = row.get("num_tokens"), row.get("perf/tokens_per_second")
        if is_number(tokens) and is_number(speed) and speed > 0:
            total += max(0.0, tokens - before) / speed
            before = tokens
    return total


def results(run: RunRecord) -> list[list[str]]:
    """Held-out metrics of the first and the last evaluation."""
    if not run.evaluations:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    table = [["held out", f"step {first['step']:,}", f"step {last['step']:,}", "95% interval"]]
    for metric, value in last.items():
        if metric in ("step", "epoch", "split", "task/accuracy") or not is_number(value):
            continue
        if metric == "rewards/accuracies":
            accuracy = accuracy_of(run, None)
            row = [
                "reward accuracy",
                *("no margins yet" if undecided(line) else share_of(line.get(metric)) for line in (first, last)),
                "" if accuracy is None else f"{interval(accuracy)} (Wilson, {run.held_out_examples:,} pairs)",
            ]
        else:
            row = [_NAMES.get(metric, metric), number(first.get(metric)), number(value), ""]
        table.append(row)
    difference = task_difference(run)
    if difference is not None:
        asked = f"(paired, {len(run.task['after']):,} problems)"
        gain = f"gain {points(difference.low)} to {points(difference.high)} points {asked}"
        table.append(["task accuracy", f"{difference.before_mean:.1%}", f"{difference.after_mean:.1%}", gain])
    return table


def differences(run: RunRecord) -> list[list[str]] | None:
    """Settings that are not the defaults of the chosen model, data, loss and so on; None where these cannot be read."""
    words = run.request["overrides"]
    chosen = tuple(word for word in words if word.partition("=")[0].lstrip("+") in GROUPS)
    folder = run.request.get("config_dir")
    try:
        defaults = compose(
            Request(chosen, Path(folder) if folder else None, str(run.request.get("config_name") or "config"))
        ).values
    except (DpoError, OSError, ValueError):
        return None
    before = dict(leaves(defaults))
    found = [["setting", "default", "here"]]
    for key, value in leaves(run.settings):
        if key.startswith(("logger", "hardware.name")) or key not in before:
            continue
        if plain(before[key]) != plain(value):
            found.append([key, plain(before[key]), plain(value)])
    return found


def data_table(run: RunRecord) -> list[list[str]]:
    table = [["", "train", "held out"]]
    splits = [run.data.get("train") or {}, run.data.get("eval") or {}]
    if not any(splits):
        return []

    def row(label: str, of: Any) -> None:
        cells = [of(split) if split else "" for split in splits]
        if any(cells):
            table.append([label, *cells])

    row("files", lambda split: ", ".join(sources(split)))
    row(
        "form",
        lambda split: ", ".join(dict.fromkeys(str(source.get("format")) for source in split.get("sources") or [])),
    )
    row("rows read", lambda split: number(sum(int(source.get("rows") or 0) for source in split.get("sources") or [])))
    row("examples", lambda split: number(split.get("examples")))
    row("prompts", lambda split: number(split.get("prompts")))
    row("duplicates", lambda split: number(split.get("duplicates")))
    row("dropped", lambda split: _reasons(split.get("dropped")))
    row("cut", lambda split: _reasons(split.get("cut")))
    row("noticed", lambda split: _reasons(split.get("noticed")))
    row("tokens of a prompt, mean", lambda split: number(split.get("mean_prompt_tokens")))
    row("of the responses, mean", lambda split: ", ".join(map(number, split.get("mean_response_tokens") or [])))
    row("longest example, tokens", lambda split: number(split.get("longest_example_tokens")))
    overlap = run.data.get("overlap")
    if isinstance(overlap, int) and splits[1]:
        table.append(["prompts in both", number(overlap), ""])
    return table


def _reasons(counts: Any) -> str:
    if not isinstance(counts, Mapping):
        return ""
    rows = {name: count.get("rows") for name, count in counts.items() if isinstance(count, Mapping)}
    return ", ".join(f"{name.replace('_', ' ')}: {number(count)}" for name, count in rows.items())


def setup_table(run: RunRecord) -> list[list[str]]:
    """What a reader asks first: model, reference, loss, data, optimiser, machine, seed."""
    environment = run.environment
    rows = [
        ["model", str(run.setting("model.path", "?"))],
        ["reference", reference_in_words(run) if run.has_reference else "none"],
        ["loss", loss_in_words(run)],
        ["optimiser", _optimizer(run)],
        ["steps", f"{run.steps:,} of {number(run.setting('global_pairs'))} pairs" + _epochs(run)],
        ["seed", number(run.setting("seed"))],
        ["hardware", _listed(environment.get("device"), run.setting("hardware.name"), _workers(run))],
        ["software", _listed(*(f"{name} {environment[name]}" for name in _SOFTWARE if environment.get(name)))],
        ["attention", str(environment.get("attention", ""))],
    ]  # fmt: skip
    return [row for row in rows if row[1]]


def _listed(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _optimizer(run: RunRecord) -> str:
    lr = run.setting("optimizer.lr")
    if lr is None:
        return ""
    return (
        f"{run.setting('optimizer.name')}, lr {number(lr)}, {run.setting('optimizer.schedule')}, "
        f"{number(run.setting('optimizer.warmup_steps'))} steps of warm-up"
    )


def _epochs(run: RunRecord) -> str:
    found = [value for _, value in numbers((*run.train, *run.evaluations), "epoch")]
    return f", {max(found):.2f} epochs" if found else ""


def _workers(run: RunRecord) -> str:
    workers = run.setting("hardware.num_workers")
    return f"{workers} workers" if workers else ""


def timing_table(run: RunRecord) -> list[list[str]]:
    seconds = training_seconds(run)
    if not seconds:
        return []
    tokens = [value for _, value in numbers(run.train, "num_tokens")]
    rows = [["training steps", in_words(seconds)]]
    if tokens:
        rows.append(["tokens", f"{tokens[-1]:,.0f} packed, {tokens[-1] / seconds:,.0f} a second"])
    if run.steps:
        rows.append(["a step", f"{seconds / run.steps:.3g} s"])
    for metric, label in (("perf/data_loading_pct", "of it waiting for data"), ("perf/sampling_pct", "of it sampling")):
        shares = [value for _, value in numbers(run.train, metric)]
        if shares:
            rows.append([label, f"{sum(shares) / len(shares):.1f}%"])
    return rows
