"""The end of a run: its final model, with a card that says what it is, and the note that the run is complete."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dpo_cli
from dpo_cli.config.schema import Config
from dpo_cli.data.reasons import REASONS
from dpo_cli.errors import CheckpointError, EndedEarly
from dpo_cli.policy.export import FinalState, export_final
from dpo_cli.policy.load import LoadedModel
from dpo_cli.policy.model_card import Result, model_card
from dpo_cli.rollout.statistics import Difference, wilson
from dpo_cli.train.health_watch import HEALTH
from dpo_cli.train.metrics_log import read_metrics
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import reference_name

FINAL = "final"
# Travels inside final/, so that a final model and the note that it is final appear in one rename.
_NOTE = "dpo_run.json"


def completed_run(config: Config, run_dir: Path) -> Path | None:
    """The final model, if it is there and of a training as long as `config` asks for now.

    Raises EndedEarly where a finding that `config` names has ended it before.
    """
    note = _read_note(run_dir)
    if note is None or note["length"] != _length(config):
        return None
    if note["ended_by"] is None:
        return run_dir / FINAL
    if note["ended_by"] in config.health.stop_on:
        raise ended_early(run_dir, step=note["step"], name=note["ended_by"])
    return None


def ended_early(run_dir: Path, *, step: int, name: str) -> EndedEarly:
    """What is told of a run that the finding `name` has ended."""
    return EndedEarly(
        f"Ended after step {step}, as health.stop_on asks: {name}. The checkpoint and final/ are of that step.",
        where=str(run_dir / HEALTH),
        hint=f"what it says there, in a new run; or dpo-train resume={run_dir} health.stop_on=[], which goes on",
    )


def write_final(
    policy: LoadedModel,
    objective: Objective,
    config: Config,
    *,
    run_dir: Path,
    step: int,
    ended_by: str | None,
    difference: Difference | None,
    state: FinalState,
) -> Path:
    """Export the policy to run_dir/final, whole and verified; a final model that was there keeps its step as a name.

    ended_by: the finding that ended the run before its last step; None where none did.
    """
    final = run_dir / FINAL
    before = _read_note(run_dir)
    if before is not None:
        final.rename(run_dir / f"{FINAL}-step-{before['step']:08d}")
    card = card_of(config, objective, run_dir=run_dir, step=step, difference=difference)
    note = {"step": step, "length": _length(config), "ended_by": ended_by}
    export_final(policy, final, card=card, state=state, notes={_NOTE: note})
    return final


def card_of(config: Config, objective: Objective, *, run_dir: Path, step: int, difference: Difference | None) -> str:
    """What a model of this run is, for its README. step: of the weights; later evaluations are left out."""
    metrics = run_dir / "metrics.jsonl"
    # A run that was stopped before its first line has none.
    rows = read_metrics(metrics) if metrics.exists() else ()
    evaluations = [row for row in rows if row["split"] == "eval" and row["step"] <= step]
    data, ran = _json_of(run_dir / "data.json"), _json_of(run_dir / "run.json")
    return model_card(
        name=run_dir.absolute().name,
        base=config.model.path,
        reference=reference_name(config) if objective.declaration.needs_reference else "none: this loss needs none",
        data=[source.path for source in config.data.train],
        loss=config.loss.name,
        formula=_first_sentence(objective.loss),
        config=config.as_dict(),
        results=_held_out_results(evaluations, difference),
        notes=_ranked_rightly(evaluations, data),
        examples=_counted(data),
        step=step,
        adapter=config.model.adapter,
        lora=config.model.lora is not None,
        versions={"dpo-cli": dpo_cli.__version__}
        | {name: ran["environment"][name] for name in ("torch", "transformers") if ran},
    )


def _json_of(file: Path) -> dict[str, Any]:
    """What the run wrote there; nothing where it has not."""
    return dict(json.loads(file.read_bytes())) if file.is_file() else {}


def _counted(data: dict[str, Any]) -> str | None:
    """How many rows there were, and what became of them."""
    if not data:
        return None
    parts = []
    for split, name in (("train", "training"), ("eval", "held out")):
        found = data.get(split)
        if not found:
            continue
        dropped = (
            f"{count['rows']:,} {REASONS[reason].format(max_tokens=data['max_tokens'])}"
            for reason, count in found["dropped"].items()
        )
        # What is held out of the training data has no rows of its own.
        told = [f"of {sum(source['rows'] for source in found['sources']):,} rows"] if found["sources"] else []
        told += [f"dropped: {', '.join(dropped)}"] if found["dropped"] else []
        parts.append(f"{found['examples']:,} {name}" + (f" ({'; '.join(told)})" if told else ""))
    return f"{', '.join(parts)}; kind: {data['kind']}"


def _ranked_rightly(evaluations: list[dict[str, Any]], data: dict[str, Any]) -> list[str]:
    """The interval of the last accuracy, where every held-out example is one pair that is ranked rightly or not."""
    accuracy = evaluations[-1].get("rewards/accuracies") if evaluations else None
    pairs = (data.get("eval") or {}).get("examples")
    if accuracy is None or not pairs or data.get("kind") != "pair":
        return []
    found = wilson(round(accuracy * pairs), pairs)
    return [
        f"At step {evaluations[-1]['step']:,} it ranks {found.value:.1%} of {pairs:,} held-out pairs as they were "
        f"ranked, by implicit reward (95 % interval {found.low:.1%} to {found.high:.1%}, {found.method})."
    ]


def _length(config: Config) -> dict[str, float | None]:
    return {"epochs": config.epochs, "max_steps": config.max_steps}


def _read_note(run_dir: Path) -> dict[str, Any] | None:
    if not (run_dir / FINAL).exists():
        return None
    try:
        note: dict[str, Any] = json.loads((run_dir / FINAL / _NOTE).read_bytes())
        return {"step": int(note["step"]), "length": note["length"], "ended_by": note.get("ended_by")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{FINAL}/ holds something that this tool did not write: {error}.",
            where=str(run_dir / FINAL),
            hint="move it away; resuming writes it again",
        ) from error


def _held_out_results(evaluations: list[dict[str, Any]], difference: Difference | None) -> list[Result]:
    """The card's table: task accuracy, and the held-out metrics of the first and the last evaluation."""
    results = []
    if difference is not None:
        interval = (difference.low, difference.high)
        results.append(Result("task accuracy", difference.before_mean, difference.after_mean, interval))
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        names = [name for name in first if name not in ("step", "split", "epoch")]
        results += [
            Result(name, first[name], last[name])
            for name in names
            if first[name] is not None and last.get(name) is not None
        ]
    return results


def _first_sentence(loss: Callable[..., Any]) -> str:
    """What a loss's docstring says it computes."""
    while hasattr(loss, "func"):
        loss = loss.func
    lines = (inspect.getdoc(loss) or "a function of its author").splitlines()
    return lines[0].rstrip(".")
