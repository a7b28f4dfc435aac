"""What a run was and came to, in words and tables: plain data for the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from dpo_cli.config.check import flatten
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.shipped import GROUPS
from dpo_cli.errors import DpoError
from dpo_cli.report.figures import undecided
from dpo_cli.report.pairs import Ranking
from dpo_cli.report.record import Row, RunRecord, numbers
from dpo_cli.rollout.statistics import Difference, Estimate, paired_difference, wilson

# Settings that every run has of its own, or that say nothing of the experiment.
_OF_THE_MACHINE = {"run_dir", "store_dir", "resume", "plan"}
_SOFTWARE = ("dpo-cli", "torch", "transformers", "deepspeed", "python")
_NAMES = {
    "loss": "loss", "rewards/margins": "reward margin", "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected", "logps/chosen": "log-prob of chosen, nats",
    "logps/rejected": "log-prob of rejected, nats", "entropy": "entropy, nats a token",
    "mean_token_accuracy": "token accuracy",
}  # fmt: skip
_LOSSES = {
    "dpo": "DPO", "robust_dpo": "robust DPO", "ipo": "IPO", "kto": "KTO", "simpo": "SimPO", "cpo": "CPO",
    "orpo": "ORPO",
    "pdpo": "PDPO", "sft_ref": "SFT", "aot": "AOT", "plackett_luce": "Plackett-Luce DPO",
}  # fmt: skip


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


def loss_in_words(run: RunRecord) -> str:
    name = _LOSSES.get(run.loss_name, run.loss_name.replace("_", " "))
    settings = [
        f"{key} = {run.setting(f'loss.{key}'):g}" for key in ("beta", "gamma") if _is_number(run.setting(f"loss.{key}"))
    ]
    return f"{name} ({', '.join(settings)})" if settings else name


def summary(run: RunRecord) -> str:
    """A sentence such as a paper has of its set-up."""
    train = run.data.get("train") or {}
    parts = [f"{loss_in_words(run)} on"]
    count = train.get("examples")
    parts.append(f"{count:,} examples of" if isinstance(count, int) else "")
    parts.append(", ".join(_sources(train)) or "unknown data")
    parts.append(f"from {run.setting('model.path', 'an unknown model')}")
    parts.append(f"(LoRA of rank {run.setting('model.lora.rank')})" if run.setting("model.lora") else "")
    parts.append(f"against {_reference(run)}" if run.has_reference else "without a reference")
    pairs = run.setting("global_pairs")
    parts.append(f"for {run.steps:,} steps" + (f" of {pairs:,} pairs." if isinstance(pairs, int) else "."))
    return " ".join(part for part in parts if part)


def _reference(run: RunRecord) -> str:
    reference = run.setting("model.reference")
    if run.setting("model.reference_sync_steps"):
        return "a reference that follows the policy"
    return "its own start" if reference in (None, "start") else f"the reference {reference}"


def _sources(split: Mapping[str, Any]) -> list[str]:
    return [str(source.get("name")) for source in split.get("sources") or [] if isinstance(source, Mapping)]


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
        found.append(Tile("training time", duration(seconds), f"{run.steps:,} steps, without evaluation and saving"))
    return found


def training_seconds(run: RunRecord) -> float:
    """What the steps took: tokens over their throughput, line by line; a run that was resumed counts each step once."""
    total, before = 0.0, 0.0
    for row in run.train:
        tokens, speed = row.get("num_tokens"), row.get("perf/tokens_per_second")
        if _is_number(tokens) and _is_number(speed) and speed > 0:
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
        if metric in ("step", "epoch", "split", "task/accuracy") or not _is_number(value):
            continue
        if metric == "rewards/accuracies":
            accuracy = accuracy_of(run, None)
            row = [
                "reward accuracy",
                *("no margins yet" if undecided(line) else _share(line.get(metric)) for line in (first, last)),
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


def command(run: RunRecord) -> str:
    """What was typed, as a shell takes it; empty where that is not known."""
    if "config_name" not in run.request:
        return ""
    words = ["dpo-train"]
    for option, default in (("config_dir", None), ("config_name", "config")):
        if run.request.get(option) not in (None, default):
            words += [f"--{option.replace('_', '-')}", str(run.request[option])]
    return shlex.join([*words, *run.request["overrides"]])


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
        if key in _OF_THE_MACHINE or key.startswith(("logger", "hardware.name")) or key not in before:
            continue
        if plain(before[key]) != plain(value):
            found.append([key, plain(before[key]), plain(value)])
    return found


def leaves(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in flatten(settings) if key not in _OF_THE_MACHINE]


def plain(value: Any) -> str:
    """A setting in one form, whether it was typed or has been checked: a list of sources by their paths alone."""
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(each, Mapping) and "path" in each for each in value)
    ):
        return ", ".join(
            f"{each['path']}" + (f" ×{each['weight']:g}" if each.get("weight", 1) != 1 else "") for each in value
        )
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:g}"
    return "null" if value is None or value in ("???", {}, []) else str(value)


def data_table(run: RunRecord) -> list[list[str]]:
    table = [["", "train", "held out"]]
    splits = [run.data.get("train") or {}, run.data.get("eval") or {}]
    if not any(splits):
        return []

    def row(label: str, of: Any) -> None:
        cells = [of(split) if split else "" for split in splits]
        if any(cells):
            table.append([label, *cells])

    row("files", lambda split: ", ".join(_sources(split)))
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
        ["reference", _reference(run) if run.has_reference else "none"],
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
    rows = [["training steps", duration(seconds)]]
    if tokens:
        rows.append(["tokens", f"{tokens[-1]:,.0f} packed, {tokens[-1] / seconds:,.0f} a second"])
    if run.steps:
        rows.append(["a step", f"{seconds / run.steps:.3g} s"])
    for metric, label in (("perf/data_loading_pct", "of it waiting for data"), ("perf/sampling_pct", "of it sampling")):
        shares = [value for _, value in numbers(run.train, metric)]
        if shares:
            rows.append([label, f"{sum(shares) / len(shares):.1f}%"])
    return rows


def shown_samples(run: RunRecord, count: int = 3) -> list[dict[str, Any]]:
    """Prompts with what the policy wrote, early and late where one was asked twice, else the first and the last."""
    rows = [row for row in run.samples if isinstance(row.get("samples"), list)]
    by_origin: dict[Any, list[Row]] = {}
    for row in rows:
        by_origin.setdefault(row.get("origin"), []).append(row)
    twice = [each for each in by_origin.values() if len(each) > 1]
    twice.sort(key=lambda each: each[0]["step"] - each[-1]["step"])
    shown = [
        {"prompt": each[0].get("prompt"), "truth": each[0].get("truth"), "written": [each[0], each[-1]]}
        for each in twice[:count]
    ]
    if not shown and rows:
        few = rows[:count] + [row for row in rows[-count:] if row not in rows[:count]]
        shown = [{"prompt": row.get("prompt"), "truth": row.get("truth"), "written": [row]} for row in few]
    return shown


def first_examples(run: RunRecord) -> list[dict[str, Any]]:
    """Examples as the model reads them."""
    rows = run.data.get("samples")
    return [
        {"origin": row.get("origin", ""), "prompt": row.get("prompt", ""), "responses": row.get("responses") or []}
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict)
    ]


def shown_answers(run: RunRecord) -> list[dict[str, Any]]:
    """Problems with the policy's answers before and after training and whether each was right, changed ones first."""
    changed: list[dict[str, Any]] = []
    same: list[dict[str, Any]] = []
    for place, row in enumerate(run.answers):
        written = [
            {"when": when, "text": row[when], "right": bool(run.task[when][place])}
            for when in ("before", "after")
            if when in row and place < len(run.task.get(when, ()))
        ]
        if written:
            shown = {"prompt": _as_text(row.get("prompt")), "truth": row.get("truth"), "written": written}
            (changed if len({each["text"] for each in written}) > 1 else same).append(shown)
    return changed + same


def _as_text(prompt: Any) -> str:
    """A prompt of messages as lines of who says what."""
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(
        f"{message.get('role')}: {message.get('content')}" for message in prompt if isinstance(message, dict)
    )


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: Any) -> str:
    """Three or four digits that matter; whole numbers whole."""
    if not _is_number(value):
        return "" if value is None else str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    # What is zero but for rounding reads as zero.
    text = f"{value:,.1f}" if abs(value) >= 1000 else "0" if abs(value) < 1e-6 else f"{value:.4g}"
    return text.replace("-", "−")


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:+.1f}".replace("-", "−")


def _share(value: Any) -> str:
    return f"{value:.1%}" if _is_number(value) else ""


def interval(estimate: Estimate) -> str:
    return f"{estimate.low:.1%} to {estimate.high:.1%}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
