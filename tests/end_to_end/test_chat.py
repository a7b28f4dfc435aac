"""dpo-chat as a user calls it: one question, a pipe, a conversation on a terminal; final models and checkpoints."""

from __future__ import annotations

import io
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from select import select

import pytest
from transformers import AutoTokenizer

from dpo_cli.cli.chat import main
from dpo_cli.cli.sample import main as sample

from .conftest import Finished, made_workplace, write_jsonl
from .test_sample import rows

QUESTION = "echo : w3 w14 w15"
SHORT = "max_new_tokens=12"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def ask(folder: Path, *words: str, piped: str = "") -> Finished:
    stdout, stderr, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(piped)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), chdir(folder):
            code = main(words)
    finally:
        sys.stdin = before
    return Finished(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Holds run, a finished LoRA run whose final model is an adapter alone."""
    folder = tmp_path_factory.mktemp("chat")
    done = made_workplace(folder, tiny_model).train("run_dir=run", "model.lora.rank=4", "model.lora.merge=false")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_reply_is_what_dpo_sample_draws(place: Path) -> None:
    asked = ask(place, "run", QUESTION, SHORT)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.count("\n") == 1
    write_jsonl(place / "q.jsonl", [{"prompt": QUESTION}])
    words = ["model=local", "model.path=run", "prompts=q.jsonl", "out=s.jsonl", f"sampling.{SHORT}"]
    with chdir(place), redirect_stdout(io.StringIO()):
        assert sample([*words, "sampling.samples_per_prompt=1"]) == 0
    ((response,),) = [row["responses"] for row in rows(place / "s.jsonl")]
    assert asked.stdout.rstrip("\n") == response["text"].rstrip("\n")
    assert ("cut after 12 tokens: max_new_tokens" in asked.stderr) != response["stopped"]


def test_a_pipe_is_one_question_and_the_reference_answers_beside(place: Path) -> None:
    both = ask(place, "run", "beside=reference", "temperature=0", SHORT, piped=f"{QUESTION}\n")
    assert both.returncode == 0, both.stderr
    alone = ask(place, "run", QUESTION, "temperature=0", SHORT)
    policy, reference = both.stdout.removeprefix("[policy]\n").split("[reference]\n")
    assert policy == alone.stdout
    assert reference != policy


def test_a_run_without_a_final_model_answers_as_its_newest_checkpoint(place: Path) -> None:
    shutil.copytree(place / "run", place / "unfinished", ignore=shutil.ignore_patterns("final"))
    asked = ask(place, "unfinished", QUESTION, "temperature=0", SHORT)
    assert "step 12 of unfinished" in asked.stderr
    assert asked.stdout == ask(place, "run", QUESTION, "temperature=0", SHORT).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "why", "not"), "the question in quotes"),
        (("runn", "why"), "did you mean run?"),
        (("run", "why", "temprature=1"), "did you mean temperature?"),
        (("run", "why", "prompt=why"), "given twice"),
        (("run",), "Nothing came from standard input"),
        (("run", "why", "beside=nobody/"), "beside"),
        (("run", "why", "system=Be brief", "chat=false"), "chat=false knows no system"),
        (("run", "why", "prompt_template={a} {b}"), "one field"),
        (("run", "w1 " * 200), "has 128 positions"),
        (("run", "why", "-m"), "no -m"),
    ],
)
def test_what_cannot_be_asked_is_told(place: Path, words: tuple[str, ...], message: str) -> None:
    asked = ask(place, *words)
    assert (asked.returncode, asked.stdout) == (2, "" if "w1" not in words[-1] else asked.stdout)
    assert message in asked.stderr


def test_a_conversation_on_a_terminal(place: Path, tiny_model: Path) -> None:
    """Answers through a chat template, goes on after /reset and Ctrl-C in and out of a reply, ends with Ctrl-D."""
    chatty = place / "chatty"
    shutil.copytree(tiny_model, chatty)
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chatty)
    outside, inside = pty.openpty()
    words = [sys.executable, "-m", "dpo_cli.cli.chat", str(chatty), "system=w0", "max_new_tokens=60"]
    talking = subprocess.Popen(
        words, stdin=inside, stdout=inside, stderr=inside, start_new_session=True, env={**os.environ, "TERM": "dumb"}
    )
    os.close(inside)
    unread = ""

    def read_until(wanted: str, *, again: Callable[[], None] | None = None) -> str:
        """again: done until it has an effect; a Ctrl-C just before readline waits is seen with the next key only."""
        nonlocal unread
        for _ in range(60):
            while wanted not in unread and select([outside], [], [], 2)[0]:
                unread += os.read(outside, 4096).decode(errors="replace")
            if wanted in unread:
                seen, _, unread = unread.partition(wanted)
                return seen
            if again is not None:
                again()
        raise AssertionError(f"waited in vain for {wanted!r} after {unread!r}")

    try:
        assert "chat template" in read_until("> ")
        os.write(outside, b"echo : w1 w2\n")
        read_until("\n")
        first = read_until("> ")
        assert "w" in first
        os.write(outside, b"/reset\n")
        read_until("> ")
        os.write(outside, b"echo : w1 w2\n")
        read_until("\n")
        read_until("w")
        os.kill(talking.pid, signal.SIGINT)
        read_until("> ")
        ctrl_c = partial(os.kill, talking.pid, signal.SIGINT)
        ctrl_c()
        read_until("Ctrl-D the session", again=ctrl_c)
        read_until("> ")
        os.write(outside, b"\x04")
        assert talking.wait(timeout=60) == 0
    finally:
        talking.kill()
        os.close(outside)
