"""The README.md of a trained model: what it was made from, with what, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dpo_cli.config.secrets import mask, without_secrets
from dpo_cli.policy.citations import bibtex


@dataclass(frozen=True)
class Result:
    """One line of the results table. interval: 95 % of the change, where it was measured."""

    name: str
    before: float
    after: float
    interval: tuple[float, float] | None = None


def model_card(
    *,
    name: str,
    base: str,
    reference: str,
    data: Sequence[str],
    loss: str,
    formula: str,
    config: Mapping[str, Any],
    results: Sequence[Result],
    notes: Sequence[str] = (),
    examples: str | None = None,
    step: int | None = None,
    adapter: str | None = None,
    lora: bool = False,
    versions: Mapping[str, str],
) -> str:
    """A complete README.md with its YAML header.

    base, reference, adapter: as the user named them. data: names or files of the training data.
    loss, formula: its name and one line of mathematics. config: the resolved configuration, printed in full with
    secrets masked. notes: sentences below the results. examples: how many there were. step: the optimiser step the
    weights are of. versions: of what it was made with, by name, dpo-cli among them.
    Paths appear only where the configuration itself has them. A licence is the user's to state, and none is.
    """
    base, data, reference = mask(base), [mask(entry) for entry in data], mask(reference)
    safe_config = without_secrets(config)
    header = {
        **({"base_model": base} if _is_hub_name(base) else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference-optimization", loss, "dpo-cli"],
        **({"datasets": hub} if (hub := [entry for entry in data if _is_hub_name(entry)]) else {}),
    }
    adapted = f", with the adapter `{adapter}` merged in" if adapter else ""
    trained = (
        "LoRA adapters, merged into the weights here (the adapter alone is in `adapter/`)" if lora else "all weights"
    )
    lines = [
        "---",
        _yaml(header).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"- **Base**: `{base}`{adapted}",
        f"- **Reference**: {reference}",
        f"- **Data**: {', '.join(f'`{entry}`' for entry in data)}",
        *([f"- **Examples**: {examples}"] if examples else []),
        f"- **Loss**: `{loss}`, {formula}",
        f"- **Trained**: {trained}",
        *([f"- **Step**: {step:,}"] if step is not None else []),
        f"- **Made with**: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        "- **Licence**: not stated here; it follows from those of the base and the data (`license:` in the header)",
        "",
        "## Results on held-out data",
        "",
        *_results_table(results),
        "",
        *(line for note in notes for line in (note, "")),
        "## Citation",
        "",
        "```bibtex",
        bibtex(loss),
        "```",
        "",
        "## Configuration",
        "",
        "Everything that was set, defaults included. Paths are those of the machine it was trained on.",
        "",
        "```yaml",
        _yaml(safe_config).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _results_table(results: Sequence[Result]) -> list[str]:
    if not results:
        return ["No held-out data was given."]
    rows = ["| | before | after | change |", "|---|---|---|---|"]
    for result in results:
        change = f"{result.after - result.before:+.4g}"
        if result.interval is not None:
            change += f" (95 % interval {result.interval[0]:+.4g} to {result.interval[1]:+.4g})"
        rows.append(f"| {result.name} | {result.before:.4g} | {result.after:.4g} | {change} |")
    return rows


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not name.endswith((".jsonl", ".json"))


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000))
