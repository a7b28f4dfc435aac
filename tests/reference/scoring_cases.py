"""Rows of token ids, and a real two-layer model that scores them with the code that training uses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dpo_cli.data.example import Example
from dpo_cli.policy import attention  # noqa: F401  registers the packed attention
from dpo_cli.policy.packed_model import PackedModel, score_examples
from dpo_cli.reference.shards import Logps

VOCABULARY = 60


class Rows:
    """Examples held in a list; what the data room memory-maps."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = list(rows)

    @property
    def sizes(self) -> np.ndarray:
        return np.array([row.packed_tokens for row in self.rows], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]


def pairs(count: int, *, seed: int = 0) -> Rows:
    """Pairs of random ids; a third share their prompt with the pair before, half of those the chosen response too."""
    random = np.random.default_rng(seed)
    rows: list[Example] = []
    for number in range(count):
        prompt = random.integers(0, VOCABULARY, random.integers(2, 12), dtype=np.int32)
        chosen, rejected = (random.integers(0, VOCABULARY, random.integers(1, 15), dtype=np.int32) for _ in range(2))
        if rows and number % 3 == 0:
            prompt = rows[-1].prompt
            chosen = rows[-1].responses[0] if number % 2 else chosen
        rows.append(Example(prompt, (chosen, rejected), origin=f"pairs.jsonl row {number + 1}"))
    return Rows(rows)


class TinyReference:
    """A two-layer Qwen2 that remembers what it was asked to score together.

    bfloat16, so that the numbers depend visibly on what is computed beside them, as they do in real runs.
    """

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
        config._attn_implementation = "packed"
        self.packed = PackedModel(Qwen2ForCausalLM(config).to(dtype).eval())
        self.calls: list[list[Example]] = []

    def __call__(self, examples: Sequence[Example]) -> list[list[Logps]]:
        self.calls.append(list(examples))
        return score_examples(self.packed, examples)

    @property
    def responses_scored(self) -> int:
        return sum(len(example.responses) for call in self.calls for example in call)
