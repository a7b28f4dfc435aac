"""What micro-batches waste, counted: `python scripts/bench/plan_waste.py --real-data DIR --write`.

Of pairs of four kinds, in steps of 64: tokens that a side computes, over tokens that the pairs have when a prompt
counts once; and how long ranks of this tool wait for the fullest one. Nothing is timed. --real-data is a folder with
gsm8k/, preferences/ and qwen2-tokenizer/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bench_report import parser_of, publish, table_of
from step_cases import CASES, QUICK_CASES, Pair, StepCase, pairs_of
from transformers.trainer_pt_utils import get_length_grouped_indices

from dpo_cli.batch.plan import microbatches

GLOBAL_PAIRS, STEPS, BUDGET = 64, 3, 8192
# TRL's default.
PAIRS_A_BATCH = 8
RANKS = (1, 4, 8)
SHAPES = ("prompt-heavy", "response-heavy", "GSM8K", "conversations")


def steps_of(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Packed tokens of every pair of a step, step by step."""
    sizes = [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs]
    return (sizes[first : first + GLOBAL_PAIRS] for first in range(0, len(sizes), GLOBAL_PAIRS))


def waited(pairs: Sequence[Pair], ranks: int) -> float:
    """Share of the ranks' time in which one has no tokens while another still has, were time tokens."""
    done = lasted = 0
    for sizes in steps_of(pairs):
        loads = [sum(sizes[place] for place in group) for group in _plan(sizes, ranks)]
        done += sum(loads)
        lasted += ranks * sum(max(loads[first : first + ranks]) for first in range(0, len(loads), ranks))
    return 1 - done / lasted


def passes(pairs: Sequence[Pair], ranks: int) -> float:
    """Of one rank in a step, mean."""
    counts = [len(_plan(sizes, ranks)) // ranks for sizes in steps_of(pairs)]
    return sum(counts) / len(counts)


def padded(pairs: Sequence[Pair]) -> int:
    """Positions of TRL's batches of these pairs, in this order: two rows a pair, each as long as the longest."""
    batches = (pairs[first : first + PAIRS_A_BATCH] for first in range(0, len(pairs), PAIRS_A_BATCH))
    return sum(2 * len(batch) * max(pair.longest for pair in batch) for batch in batches)


def grouped(pairs: Sequence[Pair]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    order = get_length_grouped_indices([pair.longest for pair in pairs], PAIRS_A_BATCH, generator=generator)
    return [pairs[index] for index in order]


def _plan(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    return microbatches(sizes, tokens_per_microbatch=BUDGET, ranks=ranks)


def row_of(name: str, pairs: Sequence[Pair]) -> list[str]:
    needed = sum(sum(sizes) for sizes in steps_of(pairs))
    apart = sum(pair.tokens for pair in pairs)
    ratios = (tokens / needed for tokens in (needed, apart, padded(pairs), padded(grouped(pairs))))
    ranks = (f"{waited(pairs, count):.1%} of {passes(pairs, count):.1f}" for count in RANKS)
    return [name, *(f"{ratio:.2f}" for ratio in ratios), *ranks]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--real-data", type=Path)
    options = parser.parse_args()
    shapes: dict[str, StepCase] = dict(QUICK_CASES) if options.quick else {name: CASES[name] for name in SHAPES}
    if options.real_data is None:
        shapes = {name: case for name, case in shapes.items() if case.lengths not in ("gsm8k", "conversations")}
    rows = []
    for name, case in shapes.items():
        measured = replace(case, global_pairs=GLOBAL_PAIRS, warmup_steps=0, timed_steps=STEPS)
        rows.append(row_of(name, pairs_of(measured, options.real_data)))
    header = (
        "pairs", "this tool", "a prompt with every response", "TRL", "TRL, length-grouped",
        *(f"waiting and passes, {count} rank{'s' if count > 1 else ''}" for count in RANKS),
    )  # fmt: skip
    publish("plan_waste.py", table_of(header, rows), write=options.write)


if __name__ == "__main__":
    main()
