"""A model, a tokenizer and preference data small enough to train in seconds, and `dpo-train` as a user calls it."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from dpo_cli.cli.train import main

DPO_TRAIN = str(Path(sys.executable).with_name("dpo-train"))
WORDS = [f"w{number}" for number in range(40)]


def save_tiny_model(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random two-layer Qwen2 whose tokenizer knows forty words and an end."""
    vocabulary = {word: index for index, word in enumerate(["<end>", "<unknown>", "echo", ":", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(Qwen2Config(**(sizes | overrides))).save_pretrained(folder)
    return folder


def echo_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Learnable preferences: the better answer repeats the words of the prompt, the worse one makes some up."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.sample(WORDS, rng.randint(2, 5))
        made_up = [rng.choice(WORDS) for _ in range(rng.randint(2, 5))]
        rows.append(
            {
                "prompt": f"echo : {' '.join(words)}",
                "chosen": f" {' '.join(words)}",
                "rejected": f" {' '.join(made_up)} w0",
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Finished(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@dataclass
class Workplace:
    """A folder with a model and data, in which dpo-train is called as a user would call it."""

    folder: Path
    defaults: list[str] = field(default_factory=list)
    threads: int = 1

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "DPO_STORE_DIR": str(self.folder / "store"),
            "NO_COLOR": "1",
        }

    def train(self, *overrides: str) -> Finished:
        """`dpo-train` with this workplace's model, data and small steps, in this process: imports are paid once."""
        return self.call(*self.defaults, *overrides)

    def call(self, *arguments: str) -> Finished:
        stdout, stderr = io.StringIO(), io.StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr), chdir(self.folder):
            before = os.environ["DPO_STORE_DIR"]
            os.environ["DPO_STORE_DIR"] = str(self.folder / "store")
            try:
                code = main(arguments)
            finally:
                os.environ["DPO_STORE_DIR"] = before
                torch.use_deterministic_algorithms(False)
        return Finished(code, stdout.getvalue(), stderr.getvalue())

    def shell(self, *arguments: str, timeout: float = 300) -> Finished:
        """The installed console script, in a process of its own."""
        done = subprocess.run(
            [DPO_TRAIN, *arguments], cwd=self.folder, env=self.environment, timeout=timeout, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        return Finished(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [DPO_TRAIN, *arguments], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def metrics(self, run: str, split: str | None = None) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if split in (None, row["split"])]

    def final_weights(self, run: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / run / "final" / "model.safetensors")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path) -> Workplace:
    return made_workplace(tmp_path, tiny_model)


def made_workplace(folder: Path, tiny_model: Path) -> Workplace:
    write_jsonl(folder / "pairs.jsonl", echo_pairs(96))
    write_jsonl(folder / "heldout.jsonl", echo_pairs(32, seed=1))
    return Workplace(
        folder,
        [
            "model=local", f"model.path={tiny_model}", "data=local", "data.train=pairs.jsonl",
            "data.eval=heldout.jsonl", "data.max_tokens=64", "data.workers=1", "tokens_per_microbatch=256",
            "global_pairs=16", "optimizer.lr=3e-3", "optimizer.warmup_steps=0", "max_steps=12", "epochs=null",
            "eval_every=6", "log_every=2", "save_every=4",
        ],
    )  # fmt: skip


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Bit for bit, not nearly."""
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, f"{len(different)} tensors differ, first {different[0]}"
