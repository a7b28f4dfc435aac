"""What a run was, in words: sentences, settings and numbers as they read, and the texts that it kept."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from dpo_cli.config.check import flatten
from dpo_cli.report.record import Row, RunRecord, is_number
from dpo_cli.rollout.statistics import Estimate

# Settings that every run has of its own, or that say nothing of the experiment.
_OF_THE_MACHINE = {"run_dir", "store_dir", "resume", "plan"}
_LOSSES = {
    "dpo": "DPO", "robust_dpo": "robust DPO", "ipo": "IPO", "kto": "KTO", "simpo": "SimPO", "cpo": "CPO",
    "orpo": "ORPO",
    "pdpo": "PDPO", "sft_ref": "SFT", "aot": "AOT", "plackett_luce": "Plackett-Luce DPO",
}  # fmt: skip


def loss_in_words(run: RunRecord) -> str:
    name = _LOSSES.get(run.loss_name, run.loss_name.replace("_", " "))
    settings = [
        f"{key} = {run.setting(f'loss.{key}'):g}" for key in ("beta", "gamma") if is_number(run.setting(f"loss.{key}"))
    ]
    return f"{name} ({', '.join(settings)})" if settings else name


def summary(run: RunRecord) -> str:
    """A sentence such as a paper has of its set-up."""
    train = run.data.get("train") or {}
    parts = [f"{loss_in_words(run)} on"]
    count = train.get("examples")
    parts.append(f"{count:,} examples of" if isinstance(count, int) else "")
    parts.append(", ".join(sources(train)) or "unknown data")
    parts.append(f"from {run.setting('model.path', 'an unknown model')}")
    parts.append(f"(LoRA of rank {run.setting('model.lora.rank')})" if run.setting("model.lora") else "")
    parts.append(f"against {reference_in_words(run)}" if run.has_reference else "without a reference")
    pairs = run.setting("global_pairs")
    parts.append(f"for {run.steps:,} steps" + (f" of {pairs:,} pairs." if isinstance(pairs, int) else "."))
    return " ".join(part for part in parts if part)


def reference_in_words(run: RunRecord) -> str:
    reference = run.setting("model.reference")
    if run.setting("model.reference_sync_steps"):
        return "a reference that follows the policy"
    return "its own start" if reference in (None, "start") else f"the reference {reference}"


def sources(split: Mapping[str, Any]) -> list[str]:
    """Names of a split's files, as data.json has them."""
    return [str(source.get("name")) for source in split.get("sources") or [] if isinstance(source, Mapping)]


def command(run: RunRecord) -> str:
    """What was typed, as a shell takes it; empty where that is not known."""
    if "config_name" not in run.request:
        return ""
    words = ["dpo-train"]
    for option, default in (("config_dir", None), ("config_name", "config")):
        if run.request.get(option) not in (None, default):
            words += [f"--{option.replace('_', '-')}", str(run.request[option])]
    return shlex.join([*words, *run.request["overrides"]])


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


def number(value: Any) -> str:
    """Three or four digits that matter; whole numbers whole."""
    if not is_number(value):
        return "" if value is None else str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    # What is zero but for rounding reads as zero.
    text = f"{value:,.1f}" if abs(value) >= 1000 else "0" if abs(value) < 1e-6 else f"{value:.4g}"
    return text.replace("-", "−")


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:+.1f}".replace("-", "−")


def share_of(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else ""


def interval(estimate: Estimate) -> str:
    return f"{estimate.low:.1%} to {estimate.high:.1%}"
