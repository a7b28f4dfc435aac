"""Tokens sampled a second, against transformers' own `generate`: `python scripts/bench/sampler.py`.

The same model, prompts, temperature and number of samples on all sides, by turns, several times over; one thread. Naive
asks `model.generate` prompt by prompt, batched asks it for all prompts at once, padded on the left. Tokens are counted
up to and with the first end token.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config

from dpo_cli.data.arithmetic import problems
from dpo_cli.policy.load import quiet_loading
from dpo_cli.rollout.generate import Sampling, generate
from dpo_cli.rollout.noise import stream

BASE = Path(__file__).resolve().parents[2] / "dpo_cli" / "example" / "base"
MAX_NEW_TOKENS = 48
# Prompts and samples of each.
SHAPES = ((8, 1), (8, 4), (64, 1), (64, 4), (256, 4))


class Bench:
    """One model and its prompts. Each side gives the number of tokens it has sampled."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, prompts: int, samples: int) -> None:
        self.model, self.tokenizer, self.samples = model.eval(), tokenizer, samples
        texts = [problem.prompt for problem in problems("validation", seed=0, count=prompts)]
        self.ids = [np.array(tokenizer(text).input_ids, dtype=np.int32) for text in texts]
        self.end = tokenizer.eos_token_id

    def ours(self) -> int:
        found = generate(
            self.model, self.ids, Sampling(MAX_NEW_TOKENS), samples_per_prompt=self.samples,
            streams=[stream(0, number) for number in range(len(self.ids))], stop_token_ids={self.end},
            pad_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return sum(len(response) for each in found for response in each)

    def batched(self) -> int:
        width = max(map(len, self.ids))
        ids = torch.full((len(self.ids), width), self.tokenizer.pad_token_id)
        for row, prompt in enumerate(self.ids):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        return self._generated(ids, ids != self.tokenizer.pad_token_id)

    def naive(self) -> int:
        rows = [torch.from_numpy(prompt.astype(np.int64))[None] for prompt in self.ids]
        return sum(self._generated(row, torch.ones_like(row)) for row in rows)

    @torch.no_grad()
    def _generated(self, ids: torch.Tensor, seen: torch.Tensor) -> int:
        found: Any = self.model.generate(
            input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=self.samples, eos_token_id=self.end,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        ends = (found[:, ids.shape[1] :] == self.end).cumsum(1)
        return int((ends == 0).sum() + (ends[:, -1] > 0).sum())


def larger_model(tokenizer: Any) -> PreTrainedModel:
    """Some 10 million random weights: there a token is arithmetic rather than overhead."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def speeds(bench: Bench, sides: tuple[str, ...], repeats: int) -> dict[str, list[float]]:
    """Tokens a second of every side, by turns; the first turn warms up and is not counted."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 1):
        for side in sides:
            run: Callable[[], int] = getattr(bench, side)
            torch.manual_seed(turn)
            began = time.perf_counter()
            tokens = run()
            if turn:
                found[side].append(tokens / (time.perf_counter() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        models = {"0.3 M, trained": AutoModelForCausalLM.from_pretrained(BASE), "10 M, random": larger_model(tokenizer)}
    machine = platform.processor() or platform.machine()
    print(f"{machine}, 1 thread, torch {torch.__version__}, transformers {transformers.__version__}")
    print("tokens a second, median (lowest-highest)")
    print(
        "| model | prompts x samples | this tool | generate, batched | generate, prompt by prompt | against batched |"
    )
    print("|---|---|---|---|---|---|")
    rows = []
    for name, model in models.items():
        for prompts, samples in SHAPES if name.startswith("0.3") else SHAPES[:4]:
            sides = ("ours", "batched", "naive") if prompts <= 64 else ("ours", "batched")
            found = speeds(Bench(model, tokenizer, prompts, samples), sides, options.repeats)
            rows.append({"model": name, "prompts": prompts, "samples": samples, **found})
            shown = [
                f"{statistics.median(found[side]):,.0f} ({min(found[side]):,.0f}-{max(found[side]):,.0f})"
                if side in found
                else ""
                for side in ("ours", "batched", "naive")
            ]
            ratio = statistics.median(found["ours"]) / statistics.median(found["batched"])
            print(f"| {name} | {prompts} x {samples} | {' | '.join(shown)} | {ratio:.1f} |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
