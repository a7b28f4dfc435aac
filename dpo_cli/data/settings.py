"""What the user asked of the data, as this room needs it: one object to read, one small one to send to workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dpo_cli.losses.types import ExampleKind

OnLong = Literal["drop", "truncate", "error"]
OnBadRow = Literal["error", "drop"]
RankedPairs = Literal["best_worst", "all"]


class DataConfig(Protocol):
    """The `data` section of a checked config; any object with these attributes will do."""

    @property
    def train(self) -> Any: ...
    @property
    def eval(self) -> Any: ...
    @property
    def eval_fraction(self) -> float: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def on_long(self) -> OnLong: ...
    @property
    def on_bad_row(self) -> OnBadRow: ...
    @property
    def chat(self) -> bool | None: ...
    @property
    def columns(self) -> Mapping[str, str] | None: ...
    @property
    def prompt_template(self) -> str | None: ...
    @property
    def token_weights(self) -> float | None: ...
    @property
    def split(self) -> str: ...
    @property
    def eval_split(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def ranked_pairs(self) -> RankedPairs: ...
    @property
    def workers(self) -> int | None: ...


@dataclass(frozen=True)
class DataSettings:
    """A DataConfig made by hand, for scripts and tests; the defaults are those of an ordinary pair file."""

    train: Any
    eval: Any = None
    eval_fraction: float = 0.0
    max_tokens: int = 1024
    on_long: OnLong = "drop"
    on_bad_row: OnBadRow = "error"
    chat: bool | None = None
    columns: Mapping[str, str] | None = None
    prompt_template: str | None = None
    token_weights: float | None = None
    split: str = "train"
    eval_split: str | None = None
    subset: str | None = None
    ranked_pairs: RankedPairs = "best_worst"
    workers: int | None = None


@dataclass(frozen=True)
class RowSettings:
    """How one row becomes examples: everything that changes its tokens, nothing else. Travels to workers."""

    kind: ExampleKind
    max_tokens: int
    on_long: OnLong
    chat: bool | None
    columns: tuple[tuple[str, str], ...]
    prompt_template: str | None
    token_weights: float | None
    ranked_pairs: RankedPairs
    stop_token_ids: frozenset[int]
    seed: int


def row_settings(data: DataConfig, *, kind: ExampleKind, stop_token_ids: frozenset[int], seed: int) -> RowSettings:
    template = data.prompt_template
    return RowSettings(
        kind=kind,
        max_tokens=data.max_tokens,
        on_long=data.on_long,
        chat=data.chat,
        columns=tuple(sorted((data.columns or {}).items())),
        prompt_template=None if template is None else decode_escapes(template),
        token_weights=data.token_weights,
        ranked_pairs=data.ranked_pairs,
        stop_token_ids=stop_token_ids,
        seed=seed,
    )


def held_out_fraction(data: DataConfig) -> float:
    """How much of the training data is held out: nothing where evaluation rows of their own are named."""
    return 0.0 if data.eval is not None or data.eval_split is not None else data.eval_fraction


_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", "\\\\": "\\"}


def decode_escapes(template: str) -> str:
    """Turn the two characters backslash and n, as a shell delivers them, into a line break; likewise \\t, \\r, \\\\."""
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found.group()], template)
