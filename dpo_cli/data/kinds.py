"""From a canonical row to the examples that a loss takes: pairs, ranked lists, single verdicts or demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.data.formats import Content, Format
from dpo_cli.data.rows import BadRow, Prompt, ReferenceLogps, Response, Row
from dpo_cli.data.settings import RankedPairs
from dpo_cli.errors import DataError
from dpo_cli.losses.types import ExampleKind


@dataclass(frozen=True)
class Draft:
    """An example before it is tokenised. row: what it was made of; responses: in the order the loss takes them."""

    row: Row
    responses: tuple[Response, ...]
    desirable: bool | None = None
    reference: tuple[ReferenceLogps, ...] | None = None

    @property
    def prompt(self) -> Prompt:
        return self.row.prompt


class Skipped(Exception):
    """A well-formed row that has nothing for this kind of loss. reason: a key of reasons.REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_POSSIBLE: dict[ExampleKind, frozenset[Content]] = {
    "pair": frozenset({"preferences", "ranked"}),
    "ranked": frozenset({"preferences", "ranked"}),
    "unpaired": frozenset({"preferences", "ranked", "unpaired"}),
    "demonstration": frozenset({"preferences", "ranked", "unpaired", "demonstrations"}),
}
_NEEDS = {
    "pair": "a chosen and a rejected response to each prompt",
    "ranked": "two or more ranked responses to each prompt",
    "unpaired": "a label (true or false) on each response",
    "demonstration": "a response to imitate",
}


def check_serves(found: Format, kind: ExampleKind, *, where: str) -> None:
    """Raise DataError when rows of this format can never become examples of this kind."""
    if found.content not in _POSSIBLE[kind]:
        hints = {
            "unpaired": "use loss=kto, or data with pairs",
            "demonstrations": "use loss=sft_ref, or data with pairs",
        }
        raise DataError(
            f"The loss needs {_NEEDS[kind]}, and these rows are {found.name}.",
            where=where,
            hint=hints.get(found.content),
        )


def check_token_weights(token_weights: float | None, kind: ExampleKind) -> None:
    if token_weights is not None and kind != "pair":
        raise DataError(
            "data.token_weights weighs the tokens in which chosen and rejected differ, and this loss takes no pairs.",
            where="data.token_weights",
            hint="data.token_weights=null, or a loss on pairs",
        )


def drafts_of(row: Row, kind: ExampleKind, *, ranked_pairs: RankedPairs) -> list[Draft]:
    """The examples a row becomes. Raises Skipped when it holds none of this kind.

    Ties are no preference: a pair takes responses of strictly different rank, and a ranked list keeps the first
    response of every rank.
    """
    if row.label is not None:
        if kind == "unpaired":
            return [Draft(row, row.responses, desirable=row.label)]
        if not row.label:
            raise Skipped("undesirable")
        return [Draft(row, row.responses)]
    if kind == "demonstration":
        return [Draft(row, _distinct(row.responses))]
    distinct = _strictly_ranked(row)
    if kind == "ranked":
        return [Draft(row, tuple(row.responses[at] for at in distinct), reference=_reference(row, distinct))]
    best, worst = distinct[0], distinct[-1]
    if kind == "unpaired":
        return [
            Draft(row, (row.responses[best],), desirable=True),
            Draft(row, (row.responses[worst],), desirable=False),
        ]
    couples = [(best, worst)]
    if ranked_pairs == "all":
        size = range(len(row.responses))
        couples = [
            (better, worse)
            for better in size
            for worse in size
            if row.levels[better] < row.levels[worse] and row.responses[better] != row.responses[worse]
        ]
    return [
        Draft(row, (row.responses[better], row.responses[worse]), reference=_reference(row, [better, worse]))
        for better, worse in couples
    ]


def _distinct(responses: tuple[Response, ...]) -> tuple[Response, ...]:
    kept: list[Response] = []
    for response in responses:
        if response not in kept:
            kept.append(response)
    return tuple(kept)


def _strictly_ranked(row: Row) -> list[int]:
    """Indices of one response a rank, best first, no text twice; at least two. Raises Skipped when there are not."""
    by_rank: list[int] = []
    for at, level in enumerate(row.levels):
        if not by_rank or level > row.levels[by_rank[-1]]:
            by_rank.append(at)
    if len(by_rank) < 2:
        raise Skipped("tied")
    kept: list[int] = []
    for at in by_rank:
        if all(row.responses[at] != row.responses[other] for other in kept):
            kept.append(at)
    if len(kept) < 2:
        raise Skipped("identical")
    return kept


def _reference(row: Row, order: list[int]) -> tuple[ReferenceLogps, ...] | None:
    return None if row.reference is None else tuple(row.reference[at] for at in order)


def check_prompt(prompt: Prompt) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow("empty", "the prompt is empty", "prompt")
    elif prompt[-1]["role"] == "assistant":
        raise BadRow("no_prompt", "the prompt ends with a message of the assistant, so it has had its reply", "prompt")
