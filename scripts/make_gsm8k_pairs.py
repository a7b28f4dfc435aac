"""Make preference pairs from GSM8K's published model solutions, as conf/data/gsm8k_pairs.yaml reads them.

    python scripts/make_gsm8k_pairs.py example_model_solutions.jsonl gsm8k_pairs/

The file comes with https://github.com/openai/grade-school-math (MIT licence): 1,319 problems, each with its ground
truth and four models' solutions, marked correct or not. Every wrong solution becomes the rejected side of a pair; the
chosen sides are the ground truth and the correct solutions, in turn. The questions are those of GSM8K's test set: a
policy trained on them must not be judged by that set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def pairs_of(problem: dict[str, Any]) -> Iterator[dict[str, str]]:
    """One pair for every wrong solution of a problem."""
    solutions = [problem[model] for model in MODELS]
    good = [problem["ground_truth"], *(s["solution"] for s in solutions if s["is_correct"])]
    wrong = [s["solution"] for s in solutions if not s["is_correct"]]
    for number, solution in enumerate(wrong):
        yield {
            "prompt": f"Question: {problem['question']}\n\nAnswer:\n",
            "chosen": with_marked_answer(good[number % len(good)]),
            "rejected": with_marked_answer(solution),
        }


def with_marked_answer(solution: str) -> str:
    """End a solution as GSM8K's own data does: "A: 18" becomes "#### 18"."""
    steps, marker, answer = solution.rpartition("\nA: ")
    return f"{steps}\n#### {answer}" if marker else solution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solutions", type=Path, help="example_model_solutions.jsonl")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--eval-every", type=int, default=10, help="hold out every so-manieth problem (default 10)")
    arguments = parser.parse_args()

    problems = [json.loads(line) for line in arguments.solutions.read_text(encoding="utf-8").splitlines()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train", False), ("eval", True)):
        # By problem, not by pair: a question seen in training says nothing about held-out ones.
        chosen = [p for n, p in enumerate(problems) if (n % arguments.eval_every == 0) == held_out]
        rows = [pair for problem in chosen for pair in pairs_of(problem)]
        file = arguments.out / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} pairs of {len(chosen)} problems")


if __name__ == "__main__":
    main()
