"""The embedded example is what its documentation says: real, disjoint, made of the base model's own answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_cli
from dpo_cli.data.arithmetic import problems, split_of
from dpo_cli.rollout.answers import Drawing, solve
from dpo_cli.rollout.generate import Sampling, generate
from dpo_cli.rollout.noise import stream
from dpo_cli.rollout.questions import Encoder, QuestionSettings, read_questions
from dpo_cli.rollout.statistics import paired_difference
from dpo_cli.rollout.verify import extract_answer, verifier_of

EXAMPLE = Path(dpo_cli.__file__).parent / "example"
# The seed and the number of samples that scripts/make_example.py makes the shipped files with.
SEED = 0
SAMPLES_PER_PROBLEM = 4


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EXAMPLE / "base")


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "base")


def test_the_whole_example_is_a_few_megabytes():
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file()) < 5e6


@pytest.mark.parametrize(
    ("name", "split"), [("pairs.jsonl", "preferences"), ("heldout.jsonl", "validation"), ("problems.jsonl", "test")]
)
def test_each_file_keeps_to_its_own_split_and_so_shares_no_problem_with_the_others(name, split):
    prompts = [row["prompt"] for row in rows(name)]
    assert {split_of(prompt) for prompt in prompts} == {split}
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize(("name", "split"), [("pairs.jsonl", "preferences"), ("heldout.jsonl", "validation")])
def test_every_chosen_answer_is_right_and_every_rejected_one_is_wrong(name, split):
    pairs = rows(name)
    right = {problem.prompt: int(problem.answer) for problem in problems(split, seed=SEED, count=20_000)}
    assert len(pairs) >= 200
    for pair in pairs:
        assert extract_answer(pair["chosen"]) == right[pair["prompt"]]
        assert extract_answer(pair["rejected"]) != right[pair["prompt"]]


def test_the_test_problems_are_the_generators_first_2000():
    expected = [
        {"prompt": problem.prompt, "answer": problem.answer} for problem in problems("test", seed=SEED, count=2000)
    ]
    assert rows("problems.jsonl") == expected


def test_both_sides_of_the_pairs_are_answers_that_the_base_model_gives_when_sampled(base, tokenizer):
    posed = problems("preferences", seed=SEED, count=300)
    answered = generate(
        base, [np.array(tokenizer(problem.prompt).input_ids, dtype=np.int32) for problem in posed], Sampling(48),
        samples_per_prompt=SAMPLES_PER_PROBLEM, streams=[stream(SEED, number) for number in range(len(posed))],
        stop_token_ids={tokenizer.eos_token_id}, pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    said = {
        problem.prompt: set(tokenizer.batch_decode([ids.tolist() for ids in samples], skip_special_tokens=True))
        for problem, samples in zip(posed, answered, strict=True)
    }
    pairs = [pair for pair in rows("pairs.jsonl") if pair["prompt"] in said]
    given = [pair[side] in said[pair["prompt"]] for pair in pairs for side in ("chosen", "rejected")]
    # Another machine's rounding may turn a sample here and there.
    assert len(given) >= 60
    assert np.mean(given) > 0.97


def test_the_base_solves_most_test_problems_but_leaves_room(base, tokenizer):
    asked = read_questions(str(EXAMPLE / "problems.jsonl"), QuestionSettings(limit=500)).questions
    encoder = Encoder(tokenizer, frozenset({tokenizer.eos_token_id}), chat=None, prompts=[])
    solved = solve(base, encoder, asked, verifier_of("gsm8k"), Drawing(Sampling(48, temperature=0), 1, 0))
    assert 0.5 < np.mean(solved) < 0.9


def test_the_tokenizer_is_exact_gives_each_digit_a_token_and_never_merges_prompt_and_answer(tokenizer):
    for pair in rows("pairs.jsonl")[:200]:
        prompt, answer = (tokenizer(pair[part]).input_ids for part in ("prompt", "chosen"))
        assert tokenizer(pair["prompt"] + pair["chosen"]).input_ids == prompt + answer
        assert tokenizer.decode(prompt + answer) == pair["prompt"] + pair["chosen"]
        pieces = [tokenizer.decode([token]) for token in prompt + answer]
        assert not [piece for piece in pieces if len(piece) > 1 and any(letter.isdigit() for letter in piece)]
    unseen = "Zoë paid 1,234.50 € at 7 o'clock\t?"
    assert tokenizer.decode(tokenizer(unseen).input_ids) == unseen
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.slow
def test_plain_dpo_train_raises_held_out_accuracy_by_at_least_three_points(tmp_path):
    environment = os.environ | {"DPO_STORE_DIR": str(tmp_path / "store")}
    command = [sys.executable, "-m", "dpo_cli", f"run_dir={tmp_path / 'run'}", "eval_every=0", "save_every=0"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    outcome = json.loads((tmp_path / "run" / "task.json").read_text())
    difference = paired_difference(*(np.array(outcome[moment], dtype=bool) for moment in ("before", "after")))
    assert difference.gain >= 0.03
    assert difference.low > 0
