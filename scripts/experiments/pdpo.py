"""What PDPO does on the arithmetic task: bases, a grid on tuning seeds, a test on others, table and picture.

    python scripts/experiments/pdpo.py base  --work DIR --study own --seeds 0 1     base policies and their pairs
    python scripts/experiments/pdpo.py grid  --work DIR --study own        the whole grid, on validation problems
    python scripts/experiments/pdpo.py test  --work DIR --study own        what the grid chose, on test problems
    python scripts/experiments/pdpo.py extra --work DIR --study own        single questions, on the tuning seeds
    python scripts/experiments/pdpo.py table --work DIR                    docs/pdpo_results.json and the tables
    python scripts/experiments/pdpo.py draw  --work DIR                    docs/pdpo_*.svg and docs/pdpo_*.png

Every run is a line of DIR/results.jsonl and is not repeated. Two processes may share DIR if their --seeds differ. Set
OMP_NUM_THREADS=1: on so small a model further threads bring little.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pdpo_runs import Workshop
from pdpo_studies import STUDIES, Study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["base", "grid", "test", "extra", "table", "draw"])
    parser.add_argument("--work", type=Path, required=True, help="folder of bases, runs and results")
    parser.add_argument("--study", choices=STUDIES, default="own", help="of base, grid, test and extra")
    parser.add_argument("--seeds", type=int, nargs="+", help="those of the stage, unless named")
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parents[2] / "docs")
    options = parser.parse_args()
    workshop = Workshop(options.work.resolve(), {study.base: study.sizes for study in STUDIES.values() if study.sizes})
    workshop.folder.mkdir(parents=True, exist_ok=True)
    run_stage(options.stage, workshop, STUDIES[options.study], options.seeds, options.docs)


def run_stage(stage: str, workshop: Workshop, study: Study, seeds: Sequence[int] | None, docs: Path) -> None:
    rows = workshop.rows()
    if stage == "base":
        for seed in seeds or (*study.tuning_seeds, *study.test_seeds):
            workshop.base(study.base, seed)
    elif stage == "grid":
        workshop.run(study.grid_cases(seeds or study.tuning_seeds))
    elif stage == "test":
        workshop.run(study.final_cases(rows, seeds or study.test_seeds))
    elif stage == "extra":
        workshop.run(study.extra_cases(rows, seeds or study.tuning_seeds))
    elif stage == "table":
        from pdpo_table import write_tables

        write_tables(rows, docs)
    else:
        from pdpo_picture import draw

        for each in STUDIES.values():
            draw(each, rows, docs)


if __name__ == "__main__":
    main()
