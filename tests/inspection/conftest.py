"""A tokenizer whose every word is a token, and dpo-data as a user calls it: what it says, and the JSON it writes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_cli.cli.data import main

# What turns a terminal red.
RED = "\x1b[31m"
SPECIAL = ["<end>", "<s>", "<user>", "<reply>"]
CHAT = (
    "{% for message in messages %}{{ '<user> ' if message['role'] == 'user' else '<reply> ' }}"
    "{{ message['content'] + (' <end>\n' if message['role'] == 'assistant' else ' ') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reply> ' }}{% endif %}"
)
# What reasoning models' templates do to a reply: its thoughts are cut out of the rendering.
CHAT_WITHOUT_THOUGHTS = CHAT.replace("message['content'] +", "message['content'].split('</think>')[-1] +")


class Checked(NamedTuple):
    """What dpo-data left. found: its findings by name."""

    code: int
    out: str
    err: str
    result: dict[str, Any]

    @property
    def found(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.result["findings"]}


def save_tokenizer(folder: Path, template: str | None = CHAT) -> Path:
    words = [f"w{number}" for number in range(500)]
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, "<unknown>", RED, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(each, normalized=False) for each in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", bos_token="<s>", unk_token="<unknown>", pad_token="<end>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Checked]:
    """Run dpo-data on rows; words are further keys."""

    def run(
        rows: Iterable[dict[str, Any]], *keys: str, held_out: Iterable[dict[str, Any]] = (), template: str | None = CHAT
    ) -> Checked:
        save_tokenizer(tmp_path / "model", template)
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        held_out = list(held_out)
        if held_out:
            write_jsonl(tmp_path / "heldout.jsonl", held_out)
        evaluated = "data.eval=heldout.jsonl" if held_out else "data.eval_fraction=0"
        result = tmp_path / "found.json"
        result.unlink(missing_ok=True)
        common = ["model=local", "model.path=./model", "data=local", "data.train=pairs.jsonl", evaluated]
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr), chdir(tmp_path):
            code = main([*common, f"store_dir={tmp_path / 'store'}", "out=found.json", *keys])
        content = json.loads(result.read_text()) if result.exists() else {}
        return Checked(code, stdout.getvalue(), stderr.getvalue(), content)

    return run
