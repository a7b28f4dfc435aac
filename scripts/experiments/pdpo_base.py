"""What a seed of the PDPO experiment begins with: a base policy of its own, its problems, and pairs of its answers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_cli
from dpo_cli.cli.train import main as dpo_train
from dpo_cli.data.arithmetic import Problem, Split, problems
from dpo_cli.rollout.generate import Sampling, generate
from dpo_cli.rollout.noise import stream
from dpo_cli.rollout.verify import extract_answer

sys.path.append(str(Path(__file__).resolve().parents[1]))
from make_example import (
    MAX_NEW_TOKENS,
    TRAINING,
    make_untrained_model,
    write_demonstrations,
    write_rows,
)

EXAMPLE = Path(dpo_cli.__file__).parent / "example"

# In tokens; what is longer is cut and counts as not ended.
LONGEST_ANSWER = MAX_NEW_TOKENS
# Problems that are sorted into solved and unsolved ones, for a generator with prompts of its own.
PROMPTS_OF_TRUTHS = 3000

# Rows of preference data, as the tool reads them.
Pairs = list[dict[str, str]]


@dataclass(frozen=True)
class Sizes:
    """How much a seed's base policy sees, and how many problems its answers make pairs of.

    lowest_accuracy: on validation problems. When a model discovers how to calculate is a matter of luck: one that has
        not within sft_steps gets more_steps, again and again, before anything is compared.
    held_out_problems follow the first `validation_problems` of their split, so no problem is in both.
    """

    demonstrations: int = 8000
    sft_steps: int = 1200
    sft_batch: int = 32
    lowest_accuracy: float = 0.4
    more_steps: int = 600
    preference_problems: int = 2000
    samples_per_problem: int = 4
    held_out_problems: int = 300
    validation_problems: int = 1000
    test_problems: int = 2000


@dataclass(frozen=True)
class Answers:
    """What a model says to problems, one list of texts a problem, and whether and after how many tokens each ended."""

    texts: list[list[str]]
    ended: list[list[bool]]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Task:
    """Greedy answers to problems: the share that is right, that ended, and their tokens on average."""

    exact_match: float
    ended: float
    tokens: float


def make_base(folder: Path, sizes: Sizes, *, seed: int) -> None:
    """Fill `folder` as far as it is not: base/final, truth.jsonl, truth-heldout.jsonl, base.json."""
    if (folder / "base.json").exists():
        return
    base = folder / "base" / "final"
    if not base.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begin_base(folder, sizes, seed=seed)
        imitate(folder, "untrained", sizes.sft_steps, sizes, seed=seed)
    steps = sizes.sft_steps
    while examine(base, posed_problems("validation", sizes, seed=seed)).exact_match < sizes.lowest_accuracy:
        (folder / "base").rename(folder / f"base-{steps}")
        imitate(folder, f"base-{steps}/final", sizes.more_steps, sizes, seed=seed + 1000)
        steps += sizes.more_steps
    told: dict[str, object] = {"sft_steps": steps}
    posed = problems("preferences", seed=seed, count=sizes.preference_problems)
    for name, asked in (("", posed), ("-heldout", held_out(sizes, seed=seed))):
        answers = answer(base, asked, samples=sizes.samples_per_problem, seed=seed)
        rows = pairs_with_truth(asked, answers)
        write_rows(folder / f"truth{name}.jsonl", rows)
        told[f"truth{name}"] = len(rows)
        told[f"sampled_accuracy{name}"] = share_right(asked, answers)
    (folder / "base.json").write_text(json.dumps(told))


def copy_example(folder: Path) -> None:
    """Fill `folder` with the embedded example's base and pairs: one for all seeds, and nothing of it is made."""
    if (folder / "base.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(EXAMPLE / "base", folder / "base" / "final")
    told = {}
    for name, rows in (("own", "pairs.jsonl"), ("own-heldout", "heldout.jsonl")):
        told[name] = len((EXAMPLE / rows).read_text(encoding="utf-8").splitlines())
        shutil.copyfile(EXAMPLE / rows, folder / f"{name}.jsonl")
    (folder / "base.json").write_text(json.dumps(told))


def make_truths(folder: Path) -> None:
    """Prompts with their worked solution, of the first problems: solved.jsonl, where no sample of the base was wrong,
    and unsolved.jsonl, where none was right. No pairs of the base's own answers come from either."""
    if (folder / "unsolved.jsonl").exists():
        return
    posed = problems("preferences", seed=0, count=PROMPTS_OF_TRUTHS)
    answers = answer(folder / "base" / "final", posed, samples=Sizes.samples_per_problem, seed=0)
    found = list(ended_answers(posed, answers))
    write_demonstrations(folder / "solved.jsonl", [problem for problem, _, wrong in found if not wrong])
    write_demonstrations(folder / "unsolved.jsonl", [problem for problem, right, _ in found if not right])


def begin_base(folder: Path, sizes: Sizes, *, seed: int) -> None:
    folder.mkdir(parents=True)
    demonstrations = problems("demonstrations", seed=seed, count=sizes.demonstrations)
    write_demonstrations(folder / "demonstrations.jsonl", demonstrations)
    make_untrained_model(folder / "untrained", demonstrations, seed=seed)


def imitate(folder: Path, model: str, steps: int, sizes: Sizes, *, seed: int) -> None:
    """Imitate the worked solutions by the tool itself, from a model in `folder` to base/final there."""
    settings = {
        "model": "local",
        "model.path": model,
        "data": "local",
        "data.train": "demonstrations.jsonl",
        "data.eval_fraction": 0,
        "data.max_tokens": 512,
        "data.workers": 1,
        "loss": "sft_ref",
        "logger": "[]",
        "epochs": "null",
        "tokens_per_microbatch": 2048,
        "log_every": 100,
        "eval_every": 0,
        "save_every": 0,
        "seed": seed,
        "run_dir": "base",
        "store_dir": "store",
        **TRAINING,
        "max_steps": steps,
        "global_pairs": sizes.sft_batch,
        "optimizer.warmup_steps": min(50, steps // 2),
    }
    train([f"{key}={value}" for key, value in settings.items()], folder)


def train(words: Sequence[str], folder: Path) -> None:
    """dpo-train in this process, in `folder`; what it says goes to train.log there."""
    with (folder / "train.log").open("a") as log, chdir(folder), redirect_stdout(log), redirect_stderr(log):
        code = dpo_train(words)
    if code:
        raise SystemExit(f"dpo-train ended with {code}: {folder / 'train.log'}\n  {' '.join(words)}")


def posed_problems(split: Split, sizes: Sizes, *, seed: int) -> list[Problem]:
    """What models are examined on: of the validation problems while tuning, of the test problems at the end."""
    count = sizes.validation_problems if split == "validation" else sizes.test_problems
    return problems(split, seed=seed, count=count)


def held_out(sizes: Sizes, *, seed: int) -> list[Problem]:
    count = sizes.validation_problems + sizes.held_out_problems
    return problems("validation", seed=seed, count=count)[sizes.validation_problems :]


def answer(model_folder: Path, posed: Sequence[Problem], *, samples: int, seed: int) -> Answers:
    """samples: at temperature 1; 0 for one greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    responses = generate(
        AutoModelForCausalLM.from_pretrained(model_folder),
        [np.array(tokenizer(problem.prompt).input_ids, dtype=np.int32) for problem in posed],
        Sampling(LONGEST_ANSWER, temperature=1.0 if samples else 0.0),
        samples_per_prompt=max(samples, 1),
        streams=[stream(seed, number) for number in range(len(posed))],
        stop_token_ids={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id,
    )
    return Answers(
        texts=[tokenizer.batch_decode([ids.tolist() for ids in each], skip_special_tokens=True) for each in responses],
        ended=[[bool(ids[-1] == tokenizer.eos_token_id) for ids in each] for each in responses],
        tokens=[[len(ids) for ids in each] for each in responses],
    )


def examine(model_folder: Path, posed: Sequence[Problem]) -> Task:
    answers = answer(model_folder, posed, samples=0, seed=0)
    return Task(
        exact_match=share_right(posed, answers),
        ended=float(np.mean([each for (each,) in answers.ended])),
        tokens=float(np.mean([each for (each,) in answers.tokens])),
    )


def share_right(posed: Sequence[Problem], answers: Answers) -> float:
    both = zip(posed, answers.texts, strict=True)
    return float(np.mean([is_right(problem, text) for problem, texts in both for text in texts]))


def is_right(problem: Problem, text: str) -> bool:
    return extract_answer(text) == int(problem.answer)


def ended_answers(posed: Sequence[Problem], answers: Answers) -> Iterable[tuple[Problem, list[str], list[str]]]:
    """Each problem with its right and its wrong answers, in the order drawn. One that was cut off is no answer."""
    for problem, texts, ended in zip(posed, answers.texts, answers.ended, strict=True):
        whole = [text for text, ends in zip(texts, ended, strict=True) if ends and text.strip()]
        right = [text for text in whole if is_right(problem, text)]
        yield problem, right, [text for text in whole if not is_right(problem, text)]


def pairs_with_truth(posed: Sequence[Problem], answers: Answers) -> Pairs:
    """Chosen: the worked solution. Rejected: the first wrong answer; no pair where there is none."""
    return [
        {"prompt": problem.prompt, "chosen": problem.solution, "rejected": wrong[0]}
        for problem, _, wrong in ended_answers(posed, answers)
        if wrong
    ]
