"""All findings, and when each is told: once when it begins, again when it has become worse or has come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.health import generator, preferences, steps
from dpo_cli.health.curves import Curves, Finding, Setup, Severity

Judge = Callable[[Curves, Setup], Finding | None]

FINDINGS: Mapping[str, Judge] = {
    judge.__name__: judge
    for judge in (
        preferences.reference_mismatch,
        preferences.chosen_falling,
        preferences.margins_saturated,
        preferences.accuracy_at_chance,
        steps.loss_at_ln2,
        steps.policy_collapsed,
        steps.beta_too_large,
        steps.gradient_spikes,
        generator.generator_inactive,
        generator.generator_runs_away,
        generator.eos_rate_falling,
        generator.length_drift,
        generator.kl_large,
    )
}
# A finding is over once it was absent for so many lines; one that comes and goes about its threshold is told once.
_LINES_UNTIL_OVER = 5


@dataclass(frozen=True)
class Told:
    """A finding that is worth telling now, after the line of this step and split."""

    name: str
    finding: Finding
    step: int
    split: str

    def as_row(self) -> dict[str, Any]:
        """A line of health.jsonl."""
        return {
            "step": self.step,
            "split": self.split,
            "name": self.name,
            "severity": self.finding.severity.name.lower(),
            "what": self.finding.what,
            "why": self.finding.why,
            "try": list(self.finding.remedies),
        }

    def as_text(self) -> str:
        """Two lines for the screen."""
        severity = self.finding.severity.name.lower()
        return (
            f"{severity}  step {self.step}  {self.name}: {self.finding.what}\n"
            f"         {self.finding.why}; try {' or '.join(self.finding.remedies)}"
        )


class Monitor:
    """Judges line after line. What it tells is a function of the lines alone: a resumed run only repeats them."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._curves = Curves()
        # Of each finding in force: as how severe it was told, and for how many lines it has been absent.
        self._severity: dict[str, Severity] = {}
        self._absent: dict[str, int] = {}

    def after(self, row: Mapping[str, Any]) -> list[Told]:
        """What there is to tell after this line of metrics.jsonl."""
        self._curves.add(row)
        told = []
        for name, judge in FINDINGS.items():
            finding = judge(self._curves, self._setup)
            if finding is None:
                self._miss(name)
                continue
            self._absent[name] = 0
            if finding.severity > self._severity.get(name, 0):
                self._severity[name] = finding.severity
                told.append(Told(name, finding, row["step"], row["split"]))
        return told

    def _miss(self, name: str) -> None:
        if name not in self._severity:
            return
        self._absent[name] += 1
        if self._absent[name] >= _LINES_UNTIL_OVER:
            del self._severity[name]
