"""What PDPO does on the arithmetic task: bases, a grid on tuning seeds, a test on others, table and picture.

    python scripts/experiments/pdpo.py base  --work DIR --seeds 0 1    base policies and their pairs
    python scripts/experiments/pdpo.py grid  --work DIR                    the whole grid, on validation problems
    python scripts/experiments/pdpo.py test  --work DIR                    what the grid chose, on test problems
    python scripts/experiments/pdpo.py extra --work DIR                    single questions, on the tuning seeds
    python scripts/experiments/pdpo.py table --work DIR                    docs/pdpo_results.json and the tables
    python scripts/experiments/pdpo.py draw  --work DIR                    docs/pdpo.svg and docs/pdpo.png

Every run is a line of DIR/results.jsonl and is not repeated. Two processes may share DIR if their --seeds differ. Set
OMP_NUM_THREADS=1: on so small a model further threads bring little.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pdpo_base import Sizes
from pdpo_runs import Case, Row, Workshop, lines_of, mean_of

# The second has gone on until more of the same brings nothing.
BASES = {"quick": Sizes(), "plateau": Sizes(sft_steps=1200)}

# Settings are chosen on the first, by validation problems; the second report, by test problems.
TUNING_SEEDS = (100,)
TEST_SEEDS = (0, 1, 2, 3, 4)

BETAS = (0.1, 0.5, 2.0)
# The beta at which DPO is known to fall, beside the tuned one.
SMALL_BETA = 0.1
GAMMAS = {"hinge": (0.3, 1.0, 3.0), "unhinged": (0.3,), "policy_gradient": (0.3, 1.0)}
# Imitation wants a larger step than preference training: it is shown at its preset's learning rate, too.
SFT_LEARNING_RATES = (1e-4, 1e-3)


def grid_cases(seeds: Sequence[int] = TUNING_SEEDS) -> Iterator[Case]:
    """Every setting on every tuning seed; the lines to compare with come first."""
    yield from (Case(seed, "validation", "base") for seed in seeds)
    yield from (Case(seed, "validation", "sft", learning_rate=rate) for rate in SFT_LEARNING_RATES for seed in seeds)
    for method in ("dpo", "dpo_all", "dpo_nll"):
        yield from (Case(seed, "validation", method, beta) for beta in BETAS for seed in seeds)
    for method, gammas in GAMMAS.items():
        for gamma in gammas:
            yield from (Case(seed, "validation", method, beta, gamma) for beta in BETAS for seed in seeds)


def tuned_beta(rows: Sequence[Row]) -> float:
    """Where DPO on the discriminator's pairs is best on the tuning seeds."""
    return max(BETAS, key=lambda beta: accuracy(rows, "dpo", beta, None))


def tuned_gamma(rows: Sequence[Row], method: str, beta: float) -> float:
    return max(GAMMAS[method], key=lambda gamma: accuracy(rows, method, beta, gamma))


def accuracy(rows: Sequence[Row], method: str, beta: float | None, gamma: float | None) -> float:
    """Of a setting of the grid, the mean over the tuning seeds."""
    found = list(lines_of((Case(seed, "validation", method, beta, gamma) for seed in TUNING_SEEDS), rows))
    mean = mean_of(row["exact_match"] for row in found)
    if mean is None or len(found) < len(TUNING_SEEDS):
        raise SystemExit(f"The grid lacks {method} at beta={beta}, gamma={gamma}: run `grid` first.")
    return mean


def final_cases(rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[Case]:
    """What is compared, in order of interest, each on all seeds at once: a stop leaves whole comparisons.

    rows: of the grid, which decides.
    """
    betas = tuple(dict.fromkeys((SMALL_BETA, tuned_beta(rows))))
    best = {(method, beta): tuned_gamma(rows, method, beta) for method in GAMMAS for beta in betas}
    settings = [Case(0, "test", "base")]
    for beta in betas:
        settings += [Case(0, "test", "dpo", beta), Case(0, "test", "hinge", beta, best["hinge", beta])]
        settings += [Case(0, "test", "dpo_nll", beta), Case(0, "test", "dpo_all", beta)]
    settings += [Case(0, "test", "sft", learning_rate=SFT_LEARNING_RATES[0])]
    for beta in betas:
        settings.append(Case(0, "test", "policy_gradient", beta, best["policy_gradient", beta]))
        settings.append(Case(0, "test", "hinge", beta, 1.0))
    for beta in betas:
        settings += [Case(0, "test", "unhinged", beta, 0.3), Case(0, "test", "hinge", beta, 0.3)]
    settings.append(Case(0, "test", "sft", learning_rate=SFT_LEARNING_RATES[1]))
    for case in dict.fromkeys(settings):
        yield from (replace(case, seed=seed) for seed in seeds)


def extra_cases(rows: Sequence[Row], seeds: Sequence[int] = TUNING_SEEDS) -> Iterator[Case]:
    """One question each, at the small beta, where the generator has something to do, and at the tuned one."""
    for beta in dict.fromkeys((SMALL_BETA, tuned_beta(rows))):
        gamma = tuned_gamma(rows, "hinge", beta)
        for options in (
            ("loss.gamma_warmup_steps=50",),
            ("rollout.temperature=0.7",),
            ("rollout.temperature=1.3",),
            ("rollout.samples_per_prompt=4",),
        ):
            yield from (Case(seed, "validation", "hinge", beta, gamma, options=options) for seed in seeds)
        own = tuned_gamma(rows, "policy_gradient", beta)
        leave_one_out = ("rollout.samples_per_prompt=4", "loss.baseline=leave_one_out")
        yield from (Case(seed, "validation", "policy_gradient", beta, own, options=leave_one_out) for seed in seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["base", "grid", "test", "extra", "table", "draw"])
    parser.add_argument("--work", type=Path, required=True, help="folder of bases, runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the stage, unless named")
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    options = parser.parse_args()
    workshop = Workshop(options.work.resolve(), BASES)
    workshop.folder.mkdir(parents=True, exist_ok=True)
    run_stage(options.stage, workshop, options.seeds, options.docs)


def run_stage(stage: str, workshop: Workshop, seeds: Sequence[int] | None, docs: Path) -> None:
    rows = workshop.rows()
    if stage == "base":
        for seed in seeds or (*TUNING_SEEDS, *TEST_SEEDS):
            workshop.base("quick", seed)
    elif stage == "grid":
        workshop.run(grid_cases(seeds or TUNING_SEEDS))
    elif stage == "test":
        workshop.run(final_cases(rows, seeds or TEST_SEEDS))
    elif stage == "extra":
        workshop.run(extra_cases(rows, seeds or TUNING_SEEDS))
    elif stage == "table":
        from pdpo_table import write_tables

        write_tables(rows, docs)
    else:
        from pdpo_picture import draw

        draw(rows, docs)


if __name__ == "__main__":
    main()
