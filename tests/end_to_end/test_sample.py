"""dpo-sample as a user calls it, with the embedded example's base model: samples, pairs, stops, training on them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.cli.sample import main
from dpo_cli.cli.train import main as train
from dpo_cli.paths import resolve_path
from dpo_cli.rollout.verify import extract_answer

from .conftest import Finished, write_jsonl

DPO_SAMPLE = [sys.executable, "-m", "dpo_cli.cli.sample"]
PROBLEMS = Path(resolve_path("dpo_cli://example/problems.jsonl"))
BASE = Path(resolve_path("dpo_cli://example/base"))
SHORT = "sampling.max_new_tokens=48"


def call(main: Callable[..., int], folder: Path, *words: str) -> Finished:
    """A command in this process: imports are paid once."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), chdir(folder):
        code = main(words)
    return Finished(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds q.jsonl, the first forty problems."""
    lines = PROBLEMS.read_text().splitlines(keepends=True)
    (tmp_path / "q.jsonl").write_text("".join(lines[:40]))
    return tmp_path


def sample(folder: Path, *words: str) -> Finished:
    return call(main, folder, "model=tiny", "prompts=q.jsonl", SHORT, *words)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_samples_hold_text_tokens_and_verdict(folder: Path) -> None:
    done = sample(folder, "out=s.jsonl", "verifier=gsm8k", "sampling.samples_per_prompt=3")
    assert done.returncode == 0, done.stderr
    found = rows(folder / "s.jsonl")
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows(folder / "q.jsonl")]
    responses = [(row["truth"], response) for row in found for response in row["responses"]]
    assert len(responses) == 120
    for truth, response in responses:
        assert set(response) == {"text", "tokens", "stopped", "right"}
        assert response["right"] == (str(extract_answer(response["text"])) == truth)
        assert response["stopped"] == (response["tokens"][-1] == 0)
    share = sum(response["right"] for _, response in responses) / 120
    assert f"right: {share:.1%}" in done.stdout
    assert "120, 100.0% stopped" in done.stdout
    assert not (folder / "s.jsonl.partial").exists()


def test_a_sample_is_a_function_of_seed_row_and_number(folder: Path) -> None:
    assert sample(folder, "out=all.jsonl").returncode == 0
    smaller = ["limit=7", "sampling.samples_per_prompt=2", "batch_tokens=300"]
    assert sample(folder, "out=few.jsonl", *smaller).returncode == 0
    assert sample(folder, "out=other.jsonl", "seed=1").returncode == 0
    everything, few, other = (rows(folder / f"{name}.jsonl") for name in ("all", "few", "other"))
    assert len(few) == 7
    for whole, part in zip(everything, few, strict=False):
        assert part["responses"] == whole["responses"][:2]
    assert other != everything


def test_verified_pairs_train(folder: Path) -> None:
    words = ["out=pairs.jsonl", "samples_out=s.jsonl", "pairs=verified", "pairs_per_prompt=2", "verifier=gsm8k"]
    done = sample(folder, *words, "sampling.samples_per_prompt=6")
    assert done.returncode == 0, done.stderr
    pairs = rows(folder / "pairs.jsonl")
    truths = {row["prompt"]: row["answer"] for row in rows(folder / "q.jsonl")}
    sampled = {row["prompt"]: [each["text"] for each in row["responses"]] for row in rows(folder / "s.jsonl")}
    assert len(pairs) > 10
    for pair in pairs:
        assert list(pair) == ["prompt", "chosen", "rejected"]
        assert str(extract_answer(pair["chosen"])) == truths[pair["prompt"]] != str(extract_answer(pair["rejected"]))
        assert {pair["chosen"], pair["rejected"]} <= set(sampled[pair["prompt"]])
    assert f"pairs: {len(pairs)}, of {len({pair['prompt'] for pair in pairs})} prompts" in done.stdout

    words = ["data=local", "data.train=pairs.jsonl", "data.eval_fraction=0", "data.max_tokens=256", "run_dir=run"]
    trained = call(train, folder, "model=tiny", *words, "max_steps=1", "optimizer.warmup_steps=0", "save_every=0")
    assert trained.returncode == 0, trained.stderr
    assert f"{len(pairs)} pairs from pairs.jsonl ({len(pairs)} rows; prompt/chosen/rejected text" in trained.stdout
    assert (folder / "run" / "final" / "model.safetensors").exists()


def chat_model(folder: Path) -> Path:
    """The embedded model with a chat template, which it was never trained on."""
    model = folder / "chat-model"
    shutil.copytree(BASE, model)
    file = model / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ '' if m.role == 'user' else '> ' }}{{ m.content }}"
        "{{ '\\n' if m.role == 'user' else eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '> ' }}{% endif %}"
    )
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return model


def test_pairs_of_chats_are_messages_that_train(folder: Path) -> None:
    model = ["model=local", f"model.path={chat_model(folder)}"]
    given = [{"prompt": row["prompt"], "chosen": f"It is {row['answer']}."} for row in rows(folder / "q.jsonl")]
    write_jsonl(folder / "given.jsonl", given)
    words = ["prompts=q.jsonl", SHORT, "chat=true", "pairs=verified", "verifier=gsm8k", "chosen=given.jsonl"]
    done = call(main, folder, *model, *words, "out=pairs.jsonl")
    assert done.returncode == 0, done.stderr
    pairs = rows(folder / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        assert [message["role"] for message in pair["prompt"]] == ["user"]
        assert pair["chosen"][0]["content"].startswith("It is ")
        assert pair["rejected"][0]["role"] == "assistant"
    words = ["data=local", "data.train=pairs.jsonl", "data.eval_fraction=0", "data.max_tokens=256", "run_dir=run"]
    trained = call(train, folder, *model, *words, "max_steps=1", "optimizer.warmup_steps=0", "global_pairs=4")
    assert trained.returncode == 0, trained.stderr
    assert f"{len(pairs)} rows; prompt/chosen/rejected messages" in trained.stdout


def test_chosen_responses_come_from_a_column_too(folder: Path) -> None:
    write_jsonl(
        folder / "q.jsonl", [{**row, "best": f"plainly\n#### {row['answer']}"} for row in rows(folder / "q.jsonl")]
    )
    done = sample(folder, "out=pairs.jsonl", "pairs=verified", "verifier=gsm8k", "chosen=best")
    assert done.returncode == 0, done.stderr
    assert {pair["chosen"].partition("\n")[0] for pair in rows(folder / "pairs.jsonl")} == {"plainly"}


def test_best_and_worst_are_those_of_the_implicit_reward(folder: Path) -> None:
    words = ["data=arithmetic", "data.train=dpo_cli://example/heldout.jsonl", "data.eval=null", "run_dir=run"]
    short = ["max_steps=8", "optimizer.warmup_steps=0", "eval.task.problems=null", "save_every=0"]
    trained = call(train, folder, "model=tiny", *words, *short)
    assert trained.returncode == 0, trained.stderr
    words = ["model=local", "model.path=run", "prompts=q.jsonl", SHORT, "pairs=best_worst", "out=pairs.jsonl"]
    done = call(main, folder, *words)
    assert done.returncode == 0, done.stderr
    pairs = rows(folder / "pairs.jsonl")
    assert len(pairs) > 10

    from dpo_cli.cli.eval import main as evaluate

    judged = ["mode=preferences", "model=local", "model.path=run", "data=pairs.jsonl", "out=judged.json"]
    assert call(evaluate, folder, *judged).returncode == 0
    assert json.loads((folder / "judged.json").read_text())["rewards/accuracies"]["value"] == 1.0


def test_a_policy_that_does_not_stop_is_cut_counted_and_in_no_pair(folder: Path) -> None:
    cut = ["sampling.max_new_tokens=2", "verifier=gsm8k"]
    done = sample(folder, "out=s.jsonl", *cut)
    assert done.returncode == 0, done.stderr
    assert "160, 0.0% stopped by themselves, 2.0 tokens" in done.stdout
    done = sample(folder, "out=pairs.jsonl", "pairs=verified", *cut)
    assert done.returncode == 2
    assert "No prompt gave a pair" in done.stderr
    assert "40 prompts without a sample that stopped" in done.stdout
    assert not (folder / "pairs.jsonl").exists()
    assert (folder / "pairs.jsonl.partial").exists(), "what was sampled is kept"


def test_a_prompt_longer_than_the_context_is_counted(folder: Path) -> None:
    long = {"prompt": "Emma has 1 pen. " * 200, "answer": "1"}
    write_jsonl(folder / "q.jsonl", [long, *rows(folder / "q.jsonl")[:5]])
    done = sample(folder, "out=s.jsonl")
    assert done.returncode == 0, done.stderr
    assert "1 prompts are too long" in done.stdout
    assert [len(row["responses"]) for row in rows(folder / "s.jsonl")] == [0, 4, 4, 4, 4, 4]

    write_jsonl(folder / "q.jsonl", [long])
    done = sample(folder, "out=none.jsonl")
    assert done.returncode == 2
    assert "no prompt leaves room for 48 new tokens" in done.stderr
    assert not (folder / "none.jsonl.partial").exists()


def test_a_bad_row_is_named(folder: Path) -> None:
    with (folder / "q.jsonl").open("a") as file:
        file.write('{"prompt": "How many?", "answer": "a few"}\n')
    done = sample(folder, "out=s.jsonl", "verifier=gsm8k")
    assert done.returncode == 2
    assert "q.jsonl row 41" in done.stderr
    done = sample(folder, "out=s.jsonl", "verifier=gsm8k", "on_bad_row=drop", "sampling.samples_per_prompt=1")
    assert done.returncode == 0, done.stderr
    assert "1 malformed rows dropped, first q.jsonl row 41" in done.stdout


def test_a_verifier_that_fails_costs_no_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    module = folder / "checks_of_mine.py"
    module.write_text("def check(response, truth):\n    raise KeyError('oops')\n")
    words = ["out=s.jsonl", "verifier=checks_of_mine.check"]
    done = sample(folder, *words)
    assert done.returncode == 2
    assert "KeyError: 'oops'" in done.stderr
    assert "q.jsonl row 1" in done.stderr
    assert "Traceback" not in done.stderr
    module.write_text("def check(response, truth):\n    return response.endswith(truth)\n")
    monkeypatch.delitem(sys.modules, "checks_of_mine")
    again = sample(folder, *words)
    assert again.returncode == 0, again.stderr
    assert "40 prompts were answered before, and are kept" in again.stdout


def test_two_commands_do_not_work_for_one_file_at_once(folder: Path) -> None:
    work = folder / "s.jsonl.partial"
    work.mkdir()
    with (work / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = sample(folder, "out=s.jsonl")
        assert done.returncode == 2
        assert "Another process is working for this file" in done.stderr
        assert (work / ".lock").exists(), "the other's folder is its own"
    assert sample(folder, "out=s.jsonl", "limit=2").returncode == 0
    assert not work.exists()


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DPO_STORE_DIR": str(folder / "store"), "NO_COLOR": "1"}


def interrupt(folder: Path, number: signal.Signals, *words: str) -> tuple[int, str]:
    """Start the command, and send it a signal once it has finished some prompts."""
    process = subprocess.Popen(
        [*DPO_SAMPLE, *words], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.partial/policy/part-*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def kept(folder: Path) -> int:
    files = folder.glob("s.jsonl.partial/policy/part-*.jsonl")
    return sum(line.endswith("\n") for file in files for line in file.open())


TWO_RANKS = ("hardware=deepspeed_zero1", "hardware.device=cpu", "hardware.num_workers=2")
LONG_JOB = (
    "model=tiny", f"prompts={PROBLEMS}", SHORT, "verifier=gsm8k", "limit=400", "sampling.samples_per_prompt=8",
    "batch_tokens=3000", "out=s.jsonl",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("hardware", [(), TWO_RANKS])
def test_stopped_or_killed_it_goes_on_and_ends_as_if_never_stopped(folder: Path, hardware: tuple[str, ...]) -> None:
    code, said = interrupt(folder, signal.SIGINT, *LONG_JOB, *hardware)
    assert code == 75, said
    assert "400 prompts were answered, and are kept" in said
    assert "give the same command again" in said
    first = kept(folder)
    assert 0 < first < 400
    other = call(main, folder, *LONG_JOB, "seed=3")
    assert other.returncode == 2
    assert "sampled with another seed" in other.stderr
    code, _ = interrupt(folder, signal.SIGKILL, *LONG_JOB, *hardware)
    assert code == -9
    # Ranks notice that their launcher is gone, finish what they have in hand, and end.
    again = subprocess.run(
        [*DPO_SAMPLE, *LONG_JOB, *hardware], cwd=folder, env=environment(folder), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert " prompts were answered before, and are kept" in again.stdout
    assert call(main, folder, *LONG_JOB[:-1], "out=at_once.jsonl").returncode == 0
    resumed, at_once = rows(folder / "s.jsonl"), rows(folder / "at_once.jsonl")
    different = sum(a != b for a, b in zip(resumed, at_once, strict=True))
    # Batches are cut elsewhere, and a last bit may turn a sample now and then.
    assert different <= 2
    assert not (folder / "s.jsonl.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_give_what_one_process_gives(folder: Path, stage: int) -> None:
    words = ["model=tiny", "prompts=q.jsonl", SHORT, "verifier=gsm8k", "pairs=verified"]
    ranks = [f"hardware=deepspeed_zero{stage}", "hardware.device=cpu", "hardware.num_workers=2"]
    done = subprocess.run(
        [*DPO_SAMPLE, *words, *ranks, "out=two.jsonl"], cwd=folder, env=environment(folder), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    assert call(main, folder, *words, "out=one.jsonl").returncode == 0
    assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()
    assert not (folder / "two.jsonl.partial").exists()
