"""Every finding of dpo-data on a few rows that have it, and what it makes of the exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dpo_cli.config.check import check as checked_config
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.data.example import Example
from dpo_cli.forecast.cost import Batch, scoring_work
from dpo_cli.forecast.plan import plan_run
from dpo_cli.inspection.cost import run_cost
from dpo_cli.inspection.measure import SplitFacts
from dpo_cli.inspection.show import show_example
from dpo_cli.policy.tokenizer import load_tokenizer
from dpo_cli.train.run_data import prepare_for

from .conftest import CHAT_WITHOUT_THOUGHTS, RED, Checked, pair, save_tokenizer, words

Check = Callable[..., Checked]
CLEAN = [pair(words(at, at + 1), words(at + 2), words(at + 3)) for at in range(0, 40, 4)]
LONG = list(range(100, 160))


def test_clean_data_pass_and_say_what_they_are(check: Check) -> None:
    done = check(CLEAN)
    assert (done.code, done.err, done.result["findings"]) == (0, "", [])
    assert "prompt/chosen/rejected text" in done.out
    assert "train: 10 pairs of 10 prompts" in done.out
    assert "end: one of '<end>' closes the responses of 10 of 10 examples" in done.out


def test_the_same_pair_the_other_way_round_contradicts(check: Check) -> None:
    swapped = pair("w0 w1", "w3", "w2")
    done = check([*CLEAN, swapped])
    assert done.code == 1
    assert "contradictions (train: 1)" in done.err
    assert "leave contradictions out of fail_on" in done.err
    assert "Traceback" not in done.err
    found = done.found["contradictions"]
    assert (found["rows"], found["first"]) == (1, ["pairs.jsonl row 11 against row 1"])
    # The same responses to another prompt say nothing about this one.
    assert "contradictions" not in check([*CLEAN, pair("w400", "w3", "w2")]).found


def test_a_finding_counts_only_where_it_is_to(check: Check) -> None:
    rows = [*CLEAN, pair("w0 w1", "w3", "w2")]
    done = check(rows, "fail_on=[]")
    assert (done.code, done.result["problems"]) == (0, [])
    assert done.found["contradictions"]["rows"] == 1
    assert check(CLEAN + CLEAN[:2]).code == 0
    assert check(CLEAN + CLEAN[:2], "fail_on=duplicates").code == 1


def test_a_ranking_and_a_verdict_may_contradict_too(check: Check) -> None:
    ranked = [{"prompt": "w1 ", "responses": ["w2", "w3", "w4"]}, {"prompt": "w1 ", "responses": ["w5", "w4", "w2"]}]
    assert check(ranked, "loss=plackett_luce").found["contradictions"]["rows"] == 1
    verdicts = [
        {"prompt": "w1 ", "completion": "w2", "label": True},
        {"prompt": "w5 ", "completion": "w2", "label": False},
        {"prompt": "w1 ", "completion": "w2", "label": False},
    ]
    found = check(verdicts, "loss=kto").found["contradictions"]
    assert (found["rows"], found["first"]) == (1, ["pairs.jsonl row 3 against row 1"])


def test_repeated_rows_are_named_with_the_first_of_their_kind(check: Check) -> None:
    found = check([*CLEAN, CLEAN[3], CLEAN[3]]).found["duplicates"]
    assert found["rows"] == 2
    assert found["first"] == ["pairs.jsonl row 11 after row 4", "pairs.jsonl row 12 after row 4"]


def test_a_row_shown_twice_for_its_weight_repeats_nothing(check: Check) -> None:
    done = check(CLEAN, "data.train=[{path: pairs.jsonl, weight: 2}]")
    assert done.result["findings"] == []
    assert "train: 20 pairs of 10 prompts" in done.out


def test_rows_that_differ_in_a_word_are_nearly_duplicates(check: Check) -> None:
    text = words(*LONG)
    near = pair(text, f"{text} w1", f"{text} w2")
    nearer = pair(text, f"{text} w3", f"{text} w2")
    same_prompt = pair(text, words(*range(200, 260)), words(*range(300, 360)))
    done = check([*CLEAN, near, same_prompt, nearer])
    found = done.found["near_duplicates"]
    assert (found["rows"], found["first"]) == (1, ["pairs.jsonl row 13 after row 11"])
    assert "near_duplicates" not in check([*CLEAN, near, nearer], "similarity=null").found


def test_held_out_prompts_that_training_has_are_told(check: Check) -> None:
    text = words(*LONG)
    held_out = [pair("w0 w1", "w8", "w9"), pair(f"{text} w1", "w8", "w9"), pair("w480", "w8", "w9")]
    done = check([*CLEAN, pair(text, "w2", "w3")], held_out=held_out)
    assert done.code == 1
    assert done.result["problems"] == ["overlap"]
    assert done.found["overlap"]["first"] == ["heldout.jsonl row 1 is pairs.jsonl row 1"]
    assert done.found["near_overlap"]["first"] == ["heldout.jsonl row 2 is like pairs.jsonl row 11"]


def test_all_bad_rows_are_counted_not_the_first_alone(check: Check) -> None:
    bad = [{**CLEAN[0], "chosen": 5}, {**CLEAN[0], "chosen": ""}, {"prompt": "w1"}]
    done = check([*CLEAN, *bad])
    assert done.code == 1
    assert done.found["bad_rows"]["rows"] == 3
    assert {"wrong_type", "empty", "missing_field"} < set(done.found)
    accepted = check([*CLEAN, *bad], "data.on_bad_row=drop")
    assert accepted.code == 0
    assert "bad_rows" not in accepted.found
    assert accepted.found["empty"]["first"] == ["pairs.jsonl row 12"]


def test_identical_responses_are_told_from_those_that_a_cut_makes_identical(check: Check) -> None:
    same = pair("w7", "w1", "w1")
    late = pair("w8", f"{words(*LONG)} w1", f"{words(*LONG)} w2")
    done = check([*CLEAN, same, late], "data.max_tokens=20", "data.on_long=truncate")
    assert done.found["identical"]["first"] == ["pairs.jsonl row 11"]
    assert done.found["identical_after_cut"]["first"] == ["pairs.jsonl row 12"]


def test_what_is_too_long_is_dropped_or_loses_its_end_token(check: Check) -> None:
    long = pair("w8", words(*LONG), "w1")
    assert check([*CLEAN, long], "data.max_tokens=20").found["too_long"]["rows"] == 1
    cut = check([*CLEAN, long], "data.max_tokens=20", "data.on_long=truncate")
    assert (cut.found["response_cut"]["effect"], cut.found["unended"]["rows"]) == ("cut", 1)
    assert "closes the responses of 10 of 11 examples" in cut.out
    assert check([*CLEAN, long], "data.max_tokens=20", "data.on_long=error").code == 2


def chat_row(reply: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "w1"}],
        "chosen": [{"role": "assistant", "content": reply}],
        "rejected": [{"role": "assistant", "content": "w3"}],
    }


def test_a_template_that_takes_words_away_is_a_problem(check: Check) -> None:
    rows = [chat_row("w2"), chat_row("w4 </think> w5")]
    assert check(rows).code == 0
    done = check(rows, template=CHAT_WITHOUT_THOUGHTS)
    assert done.code == 1
    assert "unstable_template" in done.result["problems"]
    assert "chat template: changes the prompt or reply of 1 rows" in done.out


def test_a_second_bos_is_a_problem(check: Check) -> None:
    done = check([*CLEAN, pair("<s> <s> w1", "w2", "w3"), pair("<s> w1", "w2", "w3")])
    assert done.result["problems"] == ["two_bos"]
    assert done.found["two_bos"]["first"] == ["pairs.jsonl row 11"]


def test_rows_that_exceed_a_micro_batch_are_told(check: Check) -> None:
    keys = ("data.max_tokens=130", "tokens_per_microbatch=130")
    text = words(*LONG)
    assert check([*CLEAN, pair(text, text, f"{text} w1")], *keys).found["over_budget"]["rows"] == 1


def test_nothing_left_is_bad_input(check: Check) -> None:
    done = check([pair("w1", "w2", "w2")])
    assert done.code == 2
    assert "Nothing is left of the 1 rows" in done.err
    assert done.result == {}


def test_lengths_and_tokens_are_those_of_the_rows(check: Check) -> None:
    rows = [pair("w1 w2", "w3 w4 w5", "w6"), pair("w1", "w2", "w3 w4"), pair("w5", "w7", "w8")]
    done = check(rows, "global_pairs=2", "tokens_per_microbatch=2048")
    lengths = done.result["lengths"]["train"]
    # Of a response its end token is one.
    assert [lengths["spreads"][part]["longest"] for part in ("prompt", "chosen", "rejected", "example")] == [2, 4, 3, 8]
    assert (lengths["longer_wins"], lengths["equal_lengths"]) == (1 / 3, 1 / 3)
    assert sum(count for _, _, count in lengths["histogram"]) == 3
    # (2+4+2) + (1+2+3) + (1+2+2) packed; padded, six rows as long as the longest prompt with its response.
    assert (done.result["epoch"]["packed"], done.result["epoch"]["padded"]) == (19, 36)
    assert done.result["forecast"]["steps"] == 2


def test_examples_show_what_is_scored_and_where_the_special_tokens_are(check: Check) -> None:
    out = check([chat_row(f"w2 {RED} w5")], "shown=1").out
    lines = [line.strip() for line in out.splitlines()]
    assert lines[lines.index("prompt: 3 tokens not scored, 2 of them special") + 1] == "<user> w1 <reply>"
    assert "chosen: 4 tokens scored, 1 of them special" in lines
    assert "w2 \\x1b[31m w5 <end>" in lines
    assert "prompt: " not in check([chat_row("w2")], "shown=0").out


def test_on_a_terminal_special_tokens_and_sides_have_colours_of_their_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    prompt, chosen, rejected = (
        np.array(tokenizer.encode(text), dtype=np.int32) for text in ("<user> w1", "w2 <end>", "w3 <end>")
    )
    weights = (np.array([2, 1], dtype=np.float32),) * 2
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=80, highlight=False)
    show_example(console, Example(prompt, (chosen, rejected), weights, origin="a row 1"), "pair", tokenizer)
    shown = screen.getvalue()
    for coloured in ("\x1b[1;35m<user>", "\x1b[1;35m <end>", "\x1b[2m w1", "\x1b[4;32mw2", "\x1b[4;31mw3"):
        assert coloured in shown


def test_a_model_without_sizes_has_no_forecast_and_is_no_error(check: Check) -> None:
    done = check(CLEAN)
    assert "forecast: none. This model folder has no config.json." in done.out
    assert "peak_bytes" not in done.result["forecast"]


def test_examples_as_long_as_may_be_cost_what_the_forecast_of_a_step_says() -> None:
    keys = ("model=tiny", "data.max_tokens=64", "tokens_per_microbatch=128", "hardware.device_tflops=2", "epochs=null")
    more = ("hardware.device=cpu", "max_steps=5", "global_pairs=32", "optimizer.warmup_steps=0")
    config = checked_config(compose(Request((*keys, *more))))
    plan = plan_run(config)
    half, pairs = np.full(32, 32), np.full(32, 96, dtype=np.int32)
    attended = 32 * (32**2 / 2 + 2 * (32 * 32 + 32**2 / 2))
    facts = SplitFacts({}, half, half, half, pairs, attended)
    cost = run_cost(plan, facts, epochs=5, scores_reference=True)
    assert cost.tokens == 5 * plan.step.tokens
    assert cost.training_flops == pytest.approx(5 * plan.step.flops)
    scoring = scoring_work(plan.shape, Batch.of([(32, 32, 32)] * 32))
    assert cost.reference_flops == pytest.approx(scoring.flops)
    assert cost.seconds == pytest.approx((5 * plan.step.flops + scoring.flops) / (0.4 * 2e12))
    half_a_pass = run_cost(plan, facts, epochs=0.5, scores_reference=False)
    assert (half_a_pass.training_flops, half_a_pass.reference_flops) == (pytest.approx(plan.step.flops / 2), 0)


@pytest.mark.timeout(900)
def test_the_command_itself_on_the_embedded_example(tmp_path: Path) -> None:
    called = [sys.executable, "-m", "dpo_cli.cli.data", f"store_dir={tmp_path / 'store'}", "out=found.json"]
    done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: 3,964 pairs of 3,964 prompts" in done.stdout
    assert "\x1b" not in done.stdout
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["findings"] == []
    assert result["forecast"]["steps"] == 480
    assert result["forecast"]["fits"]


@pytest.fixture
def qwen2(real_data: Path) -> tuple[str, ...]:
    return "model=local", f"model.path={real_data / 'qwen2-tokenizer'}", "data=local"


def test_demonstration_pairs_with_a_real_tokenizer(real_data: Path, qwen2: tuple[str, ...], check: Check) -> None:
    done = check([], *qwen2, f"data.train={real_data / 'preferences' / 'dpo_en_demo.json'}")
    assert done.code == 0, done.err
    assert done.found["too_long"]["rows"] + done.result["data"]["train"]["examples"] == 300
    assert done.found["duplicates"]["rows"] == 4
    assert "chat template: the prompt is rendered the same with and without a reply" in done.out


def test_gsm8k_pairs_with_a_real_tokenizer(real_data: Path, qwen2: tuple[str, ...], check: Check) -> None:
    rows = []
    for line in (real_data / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()[:400]:
        problem = json.loads(line)
        tried = [value for value in problem.values() if isinstance(value, dict)]
        rows += [
            {"question": problem["question"], "chosen": problem["ground_truth"], "rejected": each["solution"]}
            for each in tried
            if not each["is_correct"]
        ]
    done = check(rows, *qwen2, r"data.prompt_template=Question: {question}\n\nAnswer: ")
    assert done.code == 0, done.err
    # The template ends in a space, which Qwen2 puts into the reply's first token.
    assert done.found["boundary_shifted"]["rows"] > 0.9 * len(rows)


def test_training_finds_the_data_prepared(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(CLEAN).code == 0
    monkeypatch.chdir(tmp_path)
    keys = ("model=local", "model.path=./model", "data=local", "data.train=pairs.jsonl", "data.eval_fraction=0")
    config = checked_config(compose(Request((*keys, f"store_dir={tmp_path / 'store'}"))))
    tokenizer = load_tokenizer(tmp_path / "model")
    prepared = prepare_for(config, config.data, "pair", tokenizer, frozenset({0}))
    assert prepared.report.from_cache
