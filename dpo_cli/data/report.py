"""What was read, kept, dropped and cut, and why: for the screen and for the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dpo_cli.data.reasons import BAD_ROW, REASONS
from dpo_cli.losses.types import ExampleKind

FIRST_FEW = 5

EXAMPLE_NOUNS: dict[ExampleKind, str] = {
    "pair": "pairs",
    "ranked": "ranked lists",
    "unpaired": "labelled responses",
    "demonstration": "demonstrations",
}


@dataclass
class Count:
    """How many rows, and the first few by file and row."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.rows += 1
        if len(self.first) < FIRST_FEW:
            self.first.append(place)


@dataclass
class SourceReport:
    """One source: its format, how many rows it has and how many of them were read, given its weight."""

    name: str
    format: str
    weight: float
    rows: int = 0
    chat_examples: int = 0
    plain_examples: int = 0

    @property
    def rendering(self) -> str:
        if self.chat_examples and self.plain_examples:
            return "chat template and plain text"
        return "chat template" if self.chat_examples else "plain text"


@dataclass
class Sample:
    """One example as the model reads it, decoded from its ids."""

    origin: str
    prompt: str
    responses: list[str]


@dataclass
class SplitReport:
    """What became of the rows read for one split. Counts are keyed by reason."""

    examples: int = 0
    sources: list[SourceReport] = field(default_factory=list)
    dropped: dict[str, Count] = field(default_factory=dict)
    cut: dict[str, Count] = field(default_factory=dict)
    noticed: dict[str, Count] = field(default_factory=dict)
    duplicates: int = 0
    prompts: int = 0
    mean_prompt_tokens: float = 0.0
    longest_example_tokens: int = 0
    mean_response_tokens: list[float] = field(default_factory=list)
    reference: bool = False

    @property
    def bad_rows(self) -> int:
        """Rows dropped because they could not be used, at which data.on_bad_row=error would have stopped."""
        return sum(count.rows for reason, count in self.dropped.items() if reason in BAD_ROW)


@dataclass
class DataReport:
    """What prepare_data did. eos: the token put after plain text. overlap: held-out prompts that training has too."""

    kind: ExampleKind
    max_tokens: int
    eos: str
    train: SplitReport
    eval: SplitReport | None = None
    overlap: int = 0
    before_reply: str = ""
    borrowed_cut: int = 0
    samples: list[Sample] = field(default_factory=list)
    from_cache: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> DataReport:
        held_out = saved["eval"]
        return cls(
            **{
                **saved,
                "train": _split_from(saved["train"]),
                "eval": None if held_out is None else _split_from(held_out),
                "samples": [Sample(**each) for each in saved["samples"]],
            }
        )

    def lines(self) -> list[str]:
        """Plain sentences, one a line; the caller colours them."""
        told = self.split_lines("train", self.train)
        if self.eval is not None:
            told += self.split_lines("eval", self.eval)
        if self.overlap:
            told.append(f"warning: {self.overlap:,} eval prompts are training prompts too, so eval flatters the model")
        if self.borrowed_cut:
            told.append(f"note: {self.borrowed_cut:,} responses borrowed for KTO's divergence estimate were cut to fit")
        if self.before_reply.strip():
            told.append(f"note: the chat template puts {self.before_reply!r} before a reply, and it is scored with it")
        return told

    def sample_lines(self) -> list[str]:
        """The first examples as the model reads them, the middle of long texts left out."""
        told = []
        for sample in self.samples:
            told.append(f"{sample.origin}:")
            told.append(f"  prompt    {_shorten(sample.prompt)!r}")
            told += [f"  response  {_shorten(text)!r}" for text in sample.responses]
        return told

    def split_lines(self, name: str, split: SplitReport) -> list[str]:
        """Those of one split alone, under a name."""
        sources = ", ".join(self._source_text(source) for source in split.sources)
        first = f"{name}: {split.examples:,} {EXAMPLE_NOUNS[self.kind]}"
        first += f" from {sources}" if sources else " held out of the training data, by prompt"
        told = [first + f"; {split.prompts:,} prompts, up to {split.longest_example_tokens:,} tokens an example"]
        if split.mean_response_tokens:
            told.append(f"  tokens on average: prompt {split.mean_prompt_tokens:.0f}, {self._lengths(split)}")
        for verb, counts in (("dropped", split.dropped), ("cut", split.cut), ("note:", split.noticed)):
            for reason, count in sorted(counts.items(), key=lambda item: -item[1].rows):
                words = REASONS[reason].format(max_tokens=self.max_tokens)
                told.append(f"  {verb} {count.rows:,} {words} (first: {', '.join(count.first[:2])})")
        if split.duplicates:
            told.append(f"  note: {split.duplicates:,} repeat another example exactly")
        if split.reference:
            told.append("  reference log-probs come with the data")
        return told

    def _source_text(self, source: SourceReport) -> str:
        rendering = source.rendering
        if source.plain_examples:
            rendering += f", {self.eos!r} added" if self.eos else ""
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        return f"{source.name} ({source.rows:,} rows; {source.format}; {rendering}{weight})"

    def _lengths(self, split: SplitReport) -> str:
        names = {"pair": ("chosen", "rejected"), "ranked": ("best", "worst")}.get(self.kind, ("response",))
        return ", ".join(f"{name} {mean:.0f}" for name, mean in zip(names, split.mean_response_tokens, strict=True))


def _shorten(text: str, characters: int = 240) -> str:
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]} ... {text[-half:]}"


def _split_from(saved: Mapping[str, Any]) -> SplitReport:
    counts = {
        name: {reason: Count(**count) for reason, count in saved[name].items()}
        for name in ("dropped", "cut", "noticed")
    }
    sources = [SourceReport(**source) for source in saved["sources"]]
    return SplitReport(**{**saved, **counts, "sources": sources})
