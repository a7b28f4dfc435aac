"""What was found in a data set, each under one name, whether met while preparing rows or by looking at all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dpo_cli.data.reasons import BAD_ROW, FINDINGS, REASONS
from dpo_cli.data.report import FIRST_FEW, Count, DataReport, SplitReport

Effect = Literal["dropped", "cut", "kept"]


@dataclass(frozen=True)
class Finding:
    """name: a key of reasons.FINDINGS or reasons.REASONS. effect: what became of the rows. first: some of them.

    is_problem: whether it is one that the check is to fail on.
    """

    name: str
    split: str
    effect: Effect
    rows: int
    what: str
    first: list[str]
    is_problem: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def findings_of(
    report: DataReport,
    looked_at: Mapping[str, Mapping[str, Count]],
    *,
    fail_on: Collection[str],
    stops_at_bad_rows: bool,
) -> list[Finding]:
    """Problems first, then by rows.

    looked_at: by split, what `measure` found there. stops_at_bad_rows: data.on_bad_row=error.
    """
    found: list[Finding] = []
    for split, told in (("train", report.train), ("eval", report.eval)):
        if told is None:
            continue
        counted = [*_prepared(told), *(("kept", name, count) for name, count in looked_at.get(split, {}).items())]
        if stops_at_bad_rows:
            counted.append(("dropped", "bad_rows", _bad_rows(told)))
        found += [
            Finding(
                name,
                split,
                effect,
                count.rows,
                (REASONS.get(name) or FINDINGS[name]).format(max_tokens=report.max_tokens),
                count.first,
                name in fail_on,
            )
            for effect, name, count in counted
            if count.rows
        ]
    return sorted(found, key=lambda each: (not each.is_problem, -each.rows))


def _prepared(split: SplitReport) -> Iterator[tuple[Effect, str, Count]]:
    by_effect: tuple[tuple[Effect, dict[str, Count]], ...] = (
        ("dropped", split.dropped),
        ("cut", split.cut),
        ("kept", split.noticed),
    )
    for effect, counts in by_effect:
        for name, count in counts.items():
            yield effect, name, count


def _bad_rows(split: SplitReport) -> Count:
    named = [place for name, count in split.dropped.items() if name in BAD_ROW for place in count.first]
    return Count(split.bad_rows, named[:FIRST_FEW])
