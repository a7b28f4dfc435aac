"""Make everything in dpo_cli/example/ anew: `python scripts/make_example.py`, 10-15 minutes on two cores.

1. A tokenizer of Qwen2's kind, trained on the problems' text, and a small Qwen2 with random weights.
2. `dpo-train loss=sft_ref` on worked solutions, until more of it brings nothing: the base policy.
3. Samples of the base policy on problems it has not seen, checked by their answers: preference pairs.

Everything follows from --seed; the same machine, threads and versions give the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers import Qwen2Tokenizer as Tokenizer

from dpo_cli.data.arithmetic import Problem, Split, problems
from dpo_cli.rollout.generate import Sampling, generate
from dpo_cli.rollout.noise import stream
from dpo_cli.rollout.verify import extract_answer

ROOT = Path(__file__).resolve().parent.parent
DEMONSTRATIONS = 1500
PREFERENCE_PROBLEMS = 16_000
HELD_OUT_PROBLEMS = 800
VALIDATION_PROBLEMS = 1000
TEST_PROBLEMS = 2000
SAMPLES_PER_PROBLEM = 4
MAX_NEW_TOKENS = 48

# A quarter of a million weights. Where it runs in seconds, a task is learnt by heart; where it learns to calculate,
# every step costs: this is about the smallest model that does.
MODEL = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}
# Half of the steps go by before the model discovers how to calculate; the cosine then takes it to its plateau.
TRAINING = {
    "max_steps": 1600,
    "global_pairs": 64,
    "optimizer.lr": 3e-3,
    "optimizer.betas": "[0.9,0.98]",
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup_steps": 50,
    "optimizer.schedule": "cosine",
    "optimizer.final_lr_fraction": 0,
}
# A base that never discovered how to calculate solves one problem in ten.
LOWEST_BASE_ACCURACY = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "make_example", help="folder of the run itself")
    parser.add_argument("--out", type=Path, default=ROOT / "dpo_cli" / "example", help="folder of what travels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_example(options.work.resolve(), options.out.resolve(), seed=options.seed)


def make_example(work: Path, out: Path, *, seed: int) -> None:
    if work.exists():
        raise SystemExit(f"{work} exists: move it away, or name another folder with --work")
    work.mkdir(parents=True)
    demonstrations = problems("demonstrations", seed=seed, count=DEMONSTRATIONS)
    write_demonstrations(work / "demonstrations.jsonl", demonstrations)
    write_problems(work / "validation.jsonl", problems("validation", seed=seed, count=VALIDATION_PROBLEMS))
    make_untrained_model(work / "untrained", demonstrations, seed=seed)
    train_base(work, seed=seed)
    base = work / "sft" / "final"

    out.mkdir(parents=True, exist_ok=True)
    pairs = make_pairs(base, "preferences", count=PREFERENCE_PROBLEMS, seed=seed)
    held_out = make_pairs(base, "validation", count=HELD_OUT_PROBLEMS, seed=seed)
    write_rows(out / "pairs.jsonl", pairs)
    write_rows(out / "heldout.jsonl", held_out)
    write_problems(out / "problems.jsonl", problems("test", seed=seed, count=TEST_PROBLEMS))
    shutil.rmtree(out / "base", ignore_errors=True)
    shutil.copytree(base, out / "base", copy_function=shutil.copyfile)
    print(f"{out}: {len(pairs):,} pairs, {len(held_out):,} held out")


def make_untrained_model(folder: Path, demonstrations: Sequence[Problem], *, seed: int) -> None:
    """Qwen2's architecture and its way of splitting text (words, single digits), with random weights."""
    texts = [problem.prompt + problem.solution for problem in demonstrations]
    # Far more merges than there are: every word ends as one token. All bytes stay, so any text can be encoded.
    tokenizer = Tokenizer(pad_token="<|pad|>", model_max_length=512).train_new_from_iterator(
        texts, vocab_size=10_000, length=len(texts), show_progress=False
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **MODEL,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_base(work: Path, *, seed: int) -> None:
    """Imitate the worked solutions by the tool itself."""
    settings = {
        "model": "local",
        "model.path": "untrained",
        "data": "local",
        "data.train": "demonstrations.jsonl",
        "data.eval_fraction": 0,
        "data.max_tokens": 512,
        "eval.task.problems": "validation.jsonl",
        "eval.task.max_new_tokens": MAX_NEW_TOKENS,
        "loss": "sft_ref",
        "epochs": "null",
        "log_every": 100,
        "eval_every": 0,
        "save_every": 0,
        "seed": seed,
        "run_dir": "sft",
        "store_dir": "store",
        **TRAINING,
    }
    command = [sys.executable, "-m", "dpo_cli", *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, cwd=work, check=True)
    solved = json.loads((work / "sft" / "task.json").read_text())["after"]
    if np.mean(solved) < LOWEST_BASE_ACCURACY:
        raise SystemExit(f"The base solves only {np.mean(solved):.0%} of the validation problems; try another --seed")


def make_pairs(base: Path, split: Split, *, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of the base's own answers to problems of a split, one for each problem that it solves now and then."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    posed = problems(split, seed=seed, count=count)
    answered = generate(
        model,
        [np.array(tokenizer(problem.prompt).input_ids, dtype=np.int32) for problem in posed],
        Sampling(MAX_NEW_TOKENS),
        samples_per_prompt=SAMPLES_PER_PROBLEM,
        streams=[stream(seed, number) for number in range(len(posed))],
        stop_token_ids={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id,
    )
    pairs = []
    for problem, samples in zip(posed, answered, strict=True):
        # A sample that was cut off before it ended is no answer.
        ended = [ids.tolist() for ids in samples if ids[-1] == tokenizer.eos_token_id]
        pair = _pair(problem, tokenizer.batch_decode(ended, skip_special_tokens=True))
        pairs += [] if pair is None else [pair]
    return pairs


def _pair(problem: Problem, answers: Iterable[str]) -> dict[str, str] | None:
    """Chosen: the most frequent right answer. Rejected: the most frequent wrong one, the mistake it really makes."""
    by_frequency = [text for text, _ in Counter(filter(str.strip, answers)).most_common()]
    right = [text for text in by_frequency if extract_answer(text) == int(problem.answer)]
    wrong = [text for text in by_frequency if extract_answer(text) != int(problem.answer)]
    if not right or not wrong:
        return None
    return {"prompt": problem.prompt, "chosen": right[0], "rejected": wrong[0]}


def write_demonstrations(path: Path, demonstrations: Iterable[Problem]) -> None:
    write_rows(path, ({"prompt": problem.prompt, "completion": problem.solution} for problem in demonstrations))


def write_problems(path: Path, posed: Iterable[Problem]) -> None:
    write_rows(path, ({"prompt": problem.prompt, "answer": problem.answer} for problem in posed))


def write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
