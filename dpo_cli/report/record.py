"""What a run folder holds, read as it is: whatever is missing or damaged is named, and the rest is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from dpo_cli.config.secrets import mask, without_secrets
from dpo_cli.health.curves import Setup
from dpo_cli.health.monitor import Monitor
from dpo_cli.report.pairs import HeldOutPairs

Row = dict[str, Any]

_OF_A_FINDING = {"name", "severity", "what", "why", "try"}


@dataclass(frozen=True)
class RunRecord:
    """One run. settings: its configuration without secrets, empty where it cannot be read.

    train, evaluations: lines of metrics.jsonl by split. task: {"before": [0, 1, ...], "after": [...]} as far as known.
    answers: problems with what the policy answered before and after.
    missing: what is not there or not whole, in sentences.
    """

    folder: Path
    name: str
    settings: Row
    request: Row
    train: list[Row]
    evaluations: list[Row]
    data: Row
    environment: Row
    task: dict[str, list[int]]
    answers: list[Row]
    pairs: HeldOutPairs | None
    samples: list[Row]
    findings: list[Row]
    ended: Row | None
    missing: tuple[str, ...] = field(default=())

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key."""
        value: Any = self.settings
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def has_reference(self) -> bool:
        """Whether there was anything to compare the policy with."""
        if self.pairs is not None:
            return self.pairs.reference is not None
        return any(self.folder.glob("reference_*.safetensors"))

    @property
    def held_out_examples(self) -> int | None:
        count = (self.data.get("eval") or {}).get("examples")
        return count if isinstance(count, int) and count > 0 else None

    @property
    def loss_name(self) -> str:
        return str(self.setting("loss._target_", "unknown")).rpartition(".")[2].removesuffix("_loss")

    @property
    def steps(self) -> int:
        return max((int(row["step"]) for row in (*self.train, *self.evaluations)), default=0)


def read_run(folder: Path) -> RunRecord:
    """Never raises for what the folder holds or lacks."""
    missing: list[str] = []
    settings = without_secrets(_read_yaml(folder / "config.yaml", missing))
    request = _read_yaml(folder / "overrides.yaml", missing)
    request["overrides"] = [mask(str(word)) for word in request.get("overrides") or []]
    rows = [row for row in _read_lines(folder / "metrics.jsonl", missing) if "split" in row]
    train = [row for row in rows if row["split"] == "train"]
    evaluations = [row for row in rows if row["split"] == "eval"]
    if not train:
        missing.append("No training step has been logged.")
    ended = _read_json(folder / "final" / "dpo_run.json", [])
    if not ended:
        missing.append(
            "There is no final model: the run has not ended, or was stopped. What follows is what it left so far."
        )
    pairs = None
    if (folder / "eval_pairs.jsonl").exists():
        identities = _read_lines(folder / "eval_pairs.jsonl", missing, of_steps=False)
        pairs = HeldOutPairs.of(identities, _read_lines(folder / "eval_logps.jsonl", missing))
        if pairs is None:
            missing.append("eval_pairs.jsonl and eval_logps.jsonl do not fit together, or hold no evaluation.")
    elif any("rewards/accuracies" in row for row in evaluations):
        missing.append("Held-out pairs were not recorded one by one (no eval_pairs.jsonl).")
    task = _read_json(folder / "task.json", missing) if (folder / "task.json").exists() else {}
    samples = folder / "samples.jsonl"
    return RunRecord(
        folder=folder,
        name=folder.name if not folder.name.isdigit() else f"{folder.parent.name}/{folder.name}",
        settings=settings,
        request=request,
        train=train,
        evaluations=evaluations,
        data=_read_json(folder / "data.json", missing),
        environment=_read_json(folder / "run.json", missing).get("environment") or {},
        task={when: task[when] for when in ("before", "after") if isinstance(task.get(when), list) and task[when]},
        answers=[row for row in task.get("shown") or [] if isinstance(row, dict)],
        pairs=pairs,
        samples=_read_lines(samples, missing) if samples.exists() else [],
        findings=_findings(folder, settings, rows),
        ended=ended or None,
        missing=tuple(missing),
    )


def _findings(folder: Path, settings: Row, rows: list[Row]) -> list[Row]:
    """What was told while the run trained; of a run without that, what its metrics say now."""
    if (folder / "health.jsonl").exists():
        return [row for row in _read_lines(folder / "health.jsonl", []) if row.keys() >= _OF_A_FINDING]
    try:
        monitor = Monitor(Setup.of(settings))
        return [told.as_row() for row in rows for told in monitor.after(row)]
    except (KeyError, TypeError):
        return []


def _read_lines(file: Path, missing: list[str], *, of_steps: bool = True) -> list[Row]:
    if not file.exists():
        missing.append(f"There is no {file.name}.")
        return []
    rows, broken = [], 0
    with file.open("rb") as opened:
        for line in opened:
            row = _parsed(line)
            if row is None or (of_steps and not isinstance(row.get("step"), int)):
                broken += 1
            else:
                rows.append(row)
    if broken:
        missing.append(f"{file.name}: {broken} line{'s' * (broken > 1)} cannot be read; the others are used.")
    return rows


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _read_json(file: Path, missing: list[str]) -> Row:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        missing.append(f"There is no {file.name}.")
        return {}
    except (OSError, ValueError):
        missing.append(f"{file.name} cannot be read.")
        return {}
    return content if isinstance(content, dict) else {}


def _read_yaml(file: Path, missing: list[str]) -> Row:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"There is no {file.name}.")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        missing.append(f"{file.name} cannot be read.")
        return {}
    return content if isinstance(content, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(rows: Sequence[Row], name: str) -> Iterator[tuple[int, float]]:
    """(step, value) of the lines that have the metric as a number."""
    for row in rows:
        if is_number(value := row.get(name)):
            yield int(row["step"]), float(value)
