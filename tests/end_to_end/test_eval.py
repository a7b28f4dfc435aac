"""dpo-eval as a user calls it: what it finds is what training found, and what can be counted by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_cli.cli.eval import main
from dpo_cli.cli.train import main as train
from dpo_cli.rollout.statistics import mcnemar_p, pass_at_k, wilson

from .conftest import Workplace, echo_pairs, save_tiny_model, write_jsonl
from .test_sample import BASE, PROBLEMS, SHORT, call, environment, rows

QUESTIONS = ("model=tiny", f"prompts={PROBLEMS}", SHORT)
DPO_EVAL = [sys.executable, "-m", "dpo_cli.cli.eval"]
RANKS = ("hardware=deepspeed_zero3", "hardware.device=cpu", "hardware.num_workers=2")


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_task_accuracy_is_that_of_its_outcomes(tmp_path: Path) -> None:
    done = call(main, tmp_path, *QUESTIONS, "limit=60", "out=a.json")
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "a.json")
    right = [each[0] for each in result["outcomes"]]
    assert result["questions"] == len(right) == 60
    assert result["accuracy"] == wilson(sum(right), 60).as_dict()
    assert f"{sum(right) / 60:.1%}" in done.stdout
    assert not list(tmp_path.glob("*.partial"))
    # The screen alone leaves nothing behind.
    before = sorted(tmp_path.iterdir())
    assert call(main, tmp_path, *QUESTIONS, "limit=5").returncode == 0
    assert sorted(tmp_path.iterdir()) == before


def test_pass_and_majority_of_samples(tmp_path: Path) -> None:
    words = ["sampling.samples_per_prompt=6", "sampling.temperature=1", "pass_at=[1,6]", "maj_at=[1,3]"]
    done = call(main, tmp_path, *QUESTIONS, "limit=60", *words, "out=a.json")
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "a.json")
    counts = [sum(each) for each in result["outcomes"]]
    for k in (1, 6):
        expected = np.mean([pass_at_k(6, count, k) for count in counts])
        assert result["pass_at"][str(k)]["value"] == pytest.approx(expected)
    assert result["accuracy"]["value"] == pytest.approx(result["pass_at"]["1"]["value"])
    assert result["maj_at"]["1"]["value"] == pytest.approx(result["accuracy"]["value"])
    assert result["maj_at"]["3"]["low"] <= result["maj_at"]["3"]["value"] <= result["maj_at"]["3"]["high"]


def test_a_prompt_without_room_counts_as_not_solved(tmp_path: Path) -> None:
    problems = [json.loads(line) for line in PROBLEMS.read_text().splitlines()[:3]]
    write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Emma has 1 pen. " * 200, "answer": "1"}, *problems])
    done = call(main, tmp_path, "model=tiny", "prompts=q.jsonl", SHORT, "out=a.json")
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "a.json")
    assert result["questions"] == 4
    assert result["outcomes"][0] == [0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on echo pairs, of all weights and of an adapter that was not merged, and their data."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny_model(folder / "base")
    write_jsonl(folder / "pairs.jsonl", echo_pairs(96))
    write_jsonl(folder / "heldout.jsonl", echo_pairs(32, seed=1))
    words = [
        "model=local", "model.path=base", "data=local", "data.train=pairs.jsonl", "data.eval=heldout.jsonl",
        "data.max_tokens=64", "data.workers=1", "global_pairs=16", "optimizer.lr=3e-3", "optimizer.warmup_steps=0",
        "max_steps=12", "epochs=null", "eval_every=0", "save_every=0", "loss.beta=0.25",
    ]  # fmt: skip
    assert model.exists()
    assert call(train, folder, *words, "run_dir=full").returncode == 0
    assert call(train, folder, *words, "run_dir=lora", "model.lora.rank=4", "model.lora.merge=false").returncode == 0
    return folder


@pytest.mark.parametrize("name", ["full", "lora"])
def test_preferences_are_those_of_the_runs_own_last_evaluation(run: Path, name: str, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    words = ["mode=preferences", "model=local", f"model.path={name}", "data=heldout.jsonl", f"out={out}"]
    done = call(main, run, *words)
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert found["beta"] == 0.25
    last = Workplace(run).metrics(name, "eval")[-1]
    assert last["rewards/margins"] > 0.1
    for metric in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected"):
        assert found[metric]["value"] == pytest.approx(last[metric], abs=2e-4)
        assert found[metric]["low"] <= found[metric]["value"] <= found[metric]["high"]


def test_rewards_are_written_for_every_response(run: Path, tmp_path: Path) -> None:
    words = ["model=local", "model.path=full", "data=heldout.jsonl"]
    assert call(main, run, "mode=rewards", *words, f"out={tmp_path / 'r.jsonl'}").returncode == 0
    assert call(main, run, "mode=preferences", *words, f"out={tmp_path / 'p.json'}").returncode == 0
    found = rows(tmp_path / "r.jsonl")
    given = rows(run / "heldout.jsonl")
    assert len(found) == 32
    for row, pair in zip(found, given, strict=True):
        texts = [each["text"].strip() for each in row["responses"]]
        assert texts == [pair["chosen"].strip(), pair["rejected"].strip()]
        for each in row["responses"]:
            assert each["reward"] == pytest.approx(0.25 * (each["logp"] - each["reference_logp"]))
    margins = [row["responses"][0]["reward"] - row["responses"][1]["reward"] for row in found]
    assert np.mean(margins) == pytest.approx(read(tmp_path / "p.json")["rewards/margins"]["value"])


def test_a_reference_is_named_by_hand_where_there_is_no_run(run: Path, tmp_path: Path) -> None:
    by_hand = ["model.path=full/final", "model.reference=base", "beta=0.25"]
    for name, words in (("run", ["model.path=full"]), ("hand", ["model.path=full/final", "beta=0.25"])):
        reference = [] if name == "run" else ["model.reference=./base"]
        words = [*words, *reference, f"out={tmp_path / name}.json"]
        done = call(main, run, "mode=preferences", "model=local", "data=heldout.jsonl", *words)
        assert done.returncode == 0, done.stderr
    first, second = (read(tmp_path / f"{name}.json") for name in ("run", "hand"))
    assert first["rewards/margins"] == second["rewards/margins"]
    done = call(main, run, "mode=preferences", "model=local", "data=heldout.jsonl", *by_hand)
    assert done.returncode == 2, "base means the model without its adapter, and there is none"
    assert "model.reference=FOLDER" in done.stderr


def test_a_policy_is_compared_with_another_and_with_a_file(tmp_path: Path) -> None:
    questions = [*QUESTIONS[1:], "limit=40"]
    assert call(main, tmp_path, "model=tiny", *questions, "sampling.temperature=1", "out=hot.json").returncode == 0
    done = call(main, tmp_path, "model=tiny", *questions, "compare=hot.json", "out=both.json")
    assert done.returncode == 0, done.stderr
    hot, both = read(tmp_path / "hot.json"), read(tmp_path / "both.json")
    before, after = (np.array(each["outcomes"])[:, 0].astype(bool) for each in (hot, both))
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    assert gained + lost > 0
    found = both["comparison"]
    assert (found["only_second_right"], found["only_first_right"]) == (gained, lost)
    assert found["mcnemar_p"] == mcnemar_p(gained, lost)
    assert found["gain"] == pytest.approx(after.mean() - before.mean())

    files = call(main, tmp_path, "mode=compare", "compare=[hot.json,both.json]", "out=c.json")
    assert files.returncode == 0, files.stderr
    assert read(tmp_path / "c.json")["mcnemar_p"] == found["mcnemar_p"]

    same = call(main, tmp_path, "model=tiny", *questions, f"compare={BASE}", "out=same.json")
    assert same.returncode == 0, same.stderr
    result = read(tmp_path / "same.json")
    assert result["compared"]["outcomes"] == result["outcomes"]
    assert (result["comparison"]["gain"], result["comparison"]["mcnemar_p"]) == (0.0, 1.0)


def test_results_of_other_questions_or_verdicts_are_not_compared(tmp_path: Path) -> None:
    for name, words in (("a", ["limit=4"]), ("b", ["limit=5"]), ("c", ["limit=4", "verifier=exact"])):
        assert call(main, tmp_path, *QUESTIONS, *words, f"out={name}.json").returncode == 0
    for other, why in (("b", "different questions"), ("c", "judged differently")):
        done = call(main, tmp_path, "mode=compare", f"compare=[a.json,{other}.json]")
        assert done.returncode == 2
        assert why in done.stderr
    (tmp_path / "broken.json").write_text("{")
    done = call(main, tmp_path, "mode=compare", "compare=[a.json,broken.json]")
    assert done.returncode == 2
    assert "broken.json" in done.stderr


def test_keys_in_messages_are_those_of_this_command(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "echo : w1", "chosen": " w1"}\n')
    words = ["mode=preferences", "model=local", "model.path=full", f"data={tmp_path / 'bad.jsonl'}"]
    done = call(main, run, *words)
    assert done.returncode == 2
    assert "columns.prompt" in done.stderr
    assert "data.columns" not in done.stderr


def test_a_run_without_a_final_model_says_what_to_do(run: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "overrides.yaml"):
        (tmp_path / name).write_bytes((run / "full" / name).read_bytes())
    done = call(main, run, "model=local", f"model.path={tmp_path}", f"prompts={PROBLEMS}")
    assert done.returncode == 2
    assert "no final model yet" in done.stderr
    assert "dpo-export" in done.stderr


@pytest.mark.slow
def test_two_ranks_with_partitioned_weights_find_what_one_process_finds(run: Path, tmp_path: Path) -> None:
    modes = {
        "task": ("model=tiny", f"prompts={PROBLEMS}", SHORT, "limit=41"),
        "preferences": ("mode=preferences", "model=local", "model.path=full", "data=heldout.jsonl"),
    }
    for mode, words in modes.items():
        two = [*DPO_EVAL, *words, *RANKS, f"out={tmp_path / mode}-2.json"]
        done = subprocess.run(two, cwd=run, env=environment(tmp_path), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert call(main, run, *words, f"out={tmp_path / mode}-1.json").returncode == 0
    first, second = (read(tmp_path / f"task-{ranks}.json") for ranks in (1, 2))
    assert first == second
    first, second = (read(tmp_path / f"preferences-{ranks}.json") for ranks in (1, 2))
    for name, estimate in first.items():
        if isinstance(estimate, dict):
            assert second[name]["value"] == pytest.approx(estimate["value"], abs=1e-4)


@pytest.mark.slow
def test_a_task_is_evaluated_during_training_with_partitioned_weights(run: Path, tmp_path: Path) -> None:
    """Seven problems over two ranks, judged by something that about half of all texts have."""
    (tmp_path / "judging.py").write_text("def even(response, truth):\n    return sum(map(ord, response)) % 2 == 0\n")
    write_jsonl(tmp_path / "problems.jsonl", [{"prompt": f"echo : w{n} w{n + 1}", "truth": f"w{n}"} for n in range(7)])
    words = [
        "model=local", f"model.path={run / 'base'}", "data=local", f"data.train={run / 'pairs.jsonl'}",
        "data.eval_fraction=0", "data.max_tokens=64", "data.workers=1", "global_pairs=16", "optimizer.lr=3e-3",
        "optimizer.warmup_steps=0", "max_steps=20", "epochs=null", "eval_every=5", "save_every=0",
        "eval.task.problems=problems.jsonl", "eval.task.verifier=judging.even", "eval.task.max_new_tokens=5",
        "eval.task.during=5",
    ]  # fmt: skip
    for name, hardware in (("one", ()), ("two", RANKS)):
        command = [sys.executable, "-m", "dpo_cli", *words, *hardware, f"run_dir={name}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (Workplace(tmp_path).metrics(name, "eval") for name in ("one", "two"))
    assert [row["step"] for row in one] == [0, 5, 10, 15, 20]
    assert [row["task/accuracy"] for row in one] == [row["task/accuracy"] for row in two]
    first, second = (read(tmp_path / name / "task.json") for name in ("one", "two"))
    assert first == second
    assert {*first["before"], *first["after"]} == {0, 1}
