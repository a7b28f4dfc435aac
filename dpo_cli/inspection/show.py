"""A check on the screen: tables, and examples as the model reads them; as readable without colour as with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.config.commands import DataCheckConfig
from dpo_cli.data.example import Example, FloatArray, IntArray
from dpo_cli.data.report import EXAMPLE_NOUNS, DataReport
from dpo_cli.forecast.cost import ASSUMED_UTILISATION
from dpo_cli.forecast.plan import Plan
from dpo_cli.forecast.report import summary as forecast_summary
from dpo_cli.inspection.cost import RunCost
from dpo_cli.inspection.findings import Finding
from dpo_cli.inspection.lengths import SIDES, Summary
from dpo_cli.inspection.measure import PADDED_BATCH, Ends, Packing, SplitFacts
from dpo_cli.losses.types import ExampleKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A terminal folds by itself; a file has no width, and file names in a column of 80 are torn apart.
_FILE_WIDTH = 140
_BAR = 40
# Of a long text, from its beginning and from its end.
_TOKENS_SHOWN = 80
_INDENT = " " * 4
_SPECIAL = "bold magenta"
_STYLES = {"prompt": "dim", "chosen": "green", "best": "green", "response": "green", "rejected": "red", "worst": "red"}


def console_of() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_FILE_WIDTH)


def show_sources(console: Console, report: DataReport) -> None:
    table = Table(title="read")
    for name in ("split", "source", "format", "rendered as"):
        table.add_column(name, overflow="fold")
    table.add_column("rows", justify="right")
    for name, split in (("train", report.train), ("eval", report.eval)):
        for source in split.sources if split is not None else ():
            table.add_row(name, Text(source.name), source.format, source.rendering, f"{source.rows:,}")
    console.print(table)
    for name, split in (("train", report.train), ("eval", report.eval)):
        if split is not None:
            held_out = "" if split.sources else ", held out of the training data by prompt"
            _say(
                console,
                f"{name}: {split.examples:,} {EXAMPLE_NOUNS[report.kind]} of {split.prompts:,} prompts{held_out}",
            )


def show_findings(console: Console, found: Sequence[Finding]) -> None:
    if not found:
        _say(console, "Nothing to tell of any row.", style="green")
        return
    table = Table(title="found")
    table.add_column("")
    table.add_column("name", no_wrap=True)
    table.add_column("split")
    table.add_column("rows", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("first", overflow="fold")
    for each in found:
        table.add_row(
            Text("problem", style="bold red") if each.is_problem else Text("note", style="yellow"),
            each.name,
            each.split,
            f"{each.rows:,}",
            Text(f"{each.effect}: rows {each.what}"),
            Text("\n".join(each.first[:3])),
        )
    console.print(table)


def show_ends(
    console: Console, report: DataReport, ends: Ends, tokenizer: PreTrainedTokenizerBase, train: SplitFacts
) -> None:
    """How texts begin and end, and whether the chat template stays as it is once a reply follows."""
    closed = report.train.examples - train.found["unended"].rows
    stops = ", ".join(repr(str(tokenizer.convert_ids_to_tokens(each))) for each in sorted(ends.stops))
    _say(console, f"end: one of {stops} closes the responses of {closed:,} of {report.train.examples:,} examples")
    begins = "none" if ends.bos is None else repr(str(tokenizer.convert_ids_to_tokens(ends.bos)))
    _say(console, f"begin: BOS is {begins}; {train.found['two_bos'].rows:,} prompts have it twice")
    splits = [split for split in (report.train, report.eval) if split is not None]
    if any(source.chat_examples for split in splits for source in split.sources):
        changed = sum(each.dropped["unstable_template"].rows for each in splits if "unstable_template" in each.dropped)
        told = "the prompt is rendered the same with and without a reply"
        _say(console, f"chat template: {told if not changed else f'changes the prompt or reply of {changed:,} rows'}")
        if report.before_reply.strip():
            _say(console, f"chat template: puts {report.before_reply!r} before a reply, and it is scored with it")


def show_lengths(console: Console, name: str, summary: Summary) -> None:
    table = Table(title=f"{name}, tokens")
    table.add_column("")
    for column in ("mean", "median", "90%", "99%", "longest"):
        table.add_column(column, justify="right")
    for part, spread in summary.spreads.items():
        numbers = (spread.mean, spread.median, spread.p90, spread.p99, spread.longest)
        table.add_row(part, *(f"{number:,.0f}" for number in numbers))
    console.print(table)
    most = max(count for _, _, count in summary.histogram)
    for low, high, count in summary.histogram:
        _say(console, f"  {f'{low:,}-{high - 1:,}':>15}  {'#' * round(_BAR * count / most):<{_BAR}}  {count:,}")
    if summary.longer_wins is not None and summary.equal_lengths is not None:
        better, worse = SIDES["pair"]
        _say(
            console,
            f"longer wins: {better} is longer than {worse} in {summary.longer_wins:.1%}, "
            f"equally long in {summary.equal_lengths:.1%}",
        )


def show_epoch(
    console: Console,
    packed: Packing,
    examples: int,
    config: DataCheckConfig,
    *,
    steps: int,
    plan: Plan | str,
    cost: RunCost | None,
) -> None:
    told = f"epoch: {packed.packed:,} tokens"
    if packed.padded is not None:
        told += (
            f"; padded in batches of {PADDED_BATCH} pairs, with a prompt for each response, it would be "
            f"{packed.padded:,}: packing saves {1 - packed.packed / packed.padded:.0%}"
        )
    _say(console, told)
    _say(
        console,
        f"steps: {steps:,} of {min(config.global_pairs, examples):,} examples in {packed.micro_batches:.1f} "
        f"micro-batches, {packed.filled:.0%} full (tokens_per_microbatch={config.tokens_per_microbatch:,})",
    )
    if isinstance(plan, str):
        _say(console, f"forecast: none. {plan}")
        return
    _say(console, forecast_summary(plan))
    if cost is not None:
        work = f"work: {cost.training_flops / 1e15:,.3g} PFLOP to train"
        if cost.reference_flops:
            work += f", {cost.reference_flops / 1e15:,.3g} to score with the reference"
        if cost.seconds is None:
            work += "; time is unknown without hardware.device_tflops=..."
        else:
            work += f"; {cost.seconds / 3600:,.2f} h if {ASSUMED_UTILISATION:.0%} of the device's peak are reached"
        _say(console, work)


def show_example(console: Console, example: Example, kind: ExampleKind, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompt and responses, decoded from their ids; special tokens stand out, and what is scored is said."""
    console.print(Text(example.origin, style="bold"))
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    parts: list[tuple[str, IntArray, FloatArray | None]] = [("prompt", example.prompt, None)]
    weights = example.weights or (None,) * len(example.responses)
    parts += list(zip(_names(kind, len(example.responses)), example.responses, weights, strict=False))
    for name, ids, weight in parts:
        scored = "not scored" if name == "prompt" else "scored"
        if weight is not None:
            scored += f", {int((weight != 1).sum()):,} of them by another weight (underlined)"
        count = int((ids[:, None] == list(special)).any(axis=1).sum()) if special else 0
        _say(console, f"  {name}: {len(ids):,} tokens {scored}, {count:,} of them special")
        text = Text()
        for piece, is_special, weighted in _pieces(ids, weight, special, tokenizer):
            style = _SPECIAL if is_special else _STYLES.get(name, "")
            text.append(piece, style=f"{style} underline" if weighted else style)
        for line in text.wrap(console, console.width - len(_INDENT)):
            line.rstrip()
            console.print(Text(_INDENT).append_text(line), soft_wrap=True)


def _names(kind: ExampleKind, responses: int) -> list[str]:
    """Of the example's own responses; what KTO borrows of another row is not shown."""
    if kind == "ranked":
        return ["best", *(f"response {at}" for at in range(2, responses)), "worst"]
    return list(SIDES[kind])


def _pieces(
    ids: IntArray, weights: FloatArray | None, special: set[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether its tokens are special, whether they weigh more or less), the middle of a long one left out."""
    weighted = [False] * len(ids) if weights is None else (weights != 1).tolist()
    tokens = list(zip(ids.tolist(), weighted, strict=True))
    left_out = len(tokens) - 2 * _TOKENS_SHOWN
    halves = [tokens[:_TOKENS_SHOWN], tokens[-_TOKENS_SHOWN:]] if left_out > 0 else [tokens]
    for number, half in enumerate(halves):
        if number:
            yield f" [... {left_out:,} tokens ...] ", False, False
        # Decoders drop the space before a first word, so each piece is what its tokens add to those before.
        known: list[int] = []
        text = ""
        for (is_special, is_weighted), group in groupby(half, key=lambda each: (each[0] in special, each[1])):
            known += [token for token, _ in group]
            longer = str(tokenizer.decode(known))
            yield visible(longer[len(text) :]), is_special, is_weighted
            text = longer


def visible(text: str) -> str:
    """Control characters but line breaks and tabs in words: data do not steer a terminal."""
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)
