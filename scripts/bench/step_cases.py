"""What the step benchmark trains: a small Qwen2 with random weights, and pairs of given lengths, made or real."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

# Qwen2's own vocabulary.
WIDE = 151_936
NARROW = 8192
Lengths = Literal["prompt-heavy", "response-heavy", "gsm8k", "conversations", "tiny", "long"]


@dataclass(frozen=True)
class StepCase:
    """A model, its pairs and how it trains on them.

    lora_rank: trains adapters on all linear layers instead of all weights. tied: input and output embeddings are one.
    device, attention: where it computes, and model.attention of this tool there.
    warmup_steps: come first and are not timed; their losses are compared. micro_pairs: pairs a micro-batch, on both
    sides; global_pairs is a multiple of it.
    """

    lengths: Lengths
    vocabulary: int = NARROW
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    tied: bool = True
    device: Literal["cpu", "cuda"] = "cpu"
    attention: str = "auto"
    hidden: int = 256
    intermediate: int = 1024
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    global_pairs: int = 8
    micro_pairs: int = 8
    warmup_steps: int = 1
    timed_steps: int = 3
    learning_rate: float = 1e-4
    beta: float = 0.1

    def of(self, lengths: Lengths) -> StepCase:
        """The same with pairs of other lengths."""
        return replace(self, lengths=lengths)

    @property
    def steps(self) -> int:
        return self.warmup_steps + self.timed_steps

    @property
    def model_config(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
        }


# A process's first steps ask the system for memory that later ones find.
_PROMPTS = StepCase("prompt-heavy", warmup_steps=3, timed_steps=5)
_RESPONSES = _PROMPTS.of("response-heavy")
# These take minutes.
_FEW: dict[str, Any] = {"vocabulary": WIDE, "warmup_steps": 1, "timed_steps": 1}
CASES = {
    "prompt-heavy": _PROMPTS,
    "response-heavy": _RESPONSES,
    "prompt-heavy, checkpointed": replace(_PROMPTS, gradient_checkpointing=True),
    "response-heavy, checkpointed": replace(_RESPONSES, gradient_checkpointing=True),
    "prompt-heavy, 4 pairs at once": replace(_PROMPTS, micro_pairs=4),
    "response-heavy, 4 pairs at once": replace(_RESPONSES, micro_pairs=4),
    "prompt-heavy, bfloat16": replace(_PROMPTS, dtype="bfloat16"),
    "response-heavy, bfloat16": replace(_RESPONSES, dtype="bfloat16"),
    "prompt-heavy, wide vocabulary": replace(_PROMPTS, **_FEW),
    "response-heavy, wide vocabulary": replace(_RESPONSES, **_FEW),
    "GSM8K": replace(_PROMPTS.of("gsm8k"), **(_FEW | {"timed_steps": 2})),
    "conversations": replace(_PROMPTS.of("conversations"), **_FEW),
}
QUICK = StepCase(
    "tiny", vocabulary=500, hidden=32, intermediate=64, layers=2, heads=4, global_pairs=4, micro_pairs=2,
)  # fmt: skip
QUICK_CASES = {
    "quick": QUICK,
    "quick, adapters": replace(QUICK, dtype="bfloat16", lora_rank=4, tied=False, gradient_checkpointing=True),
}


@dataclass(frozen=True)
class Pair:
    """Token ids, and summed log-probs in nats that stand for the reference's."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference_chosen: float
    reference_rejected: float

    @property
    def tokens(self) -> int:
        """Of two whole sequences, padding left out: what a trainer sees that shares no prompts."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def pairs_of(case: StepCase, real_data: Path | None) -> list[Pair]:
    """The pairs of all steps, step after step; the same for every side, and in every process."""
    random, count = np.random.default_rng(0), case.steps * case.global_pairs
    if case.lengths in ("gsm8k", "conversations"):
        if real_data is None:
            raise ValueError(f"{case.lengths} needs --real-data DIR")
        rows = _real_ids(case.lengths, real_data)
        chosen = random.permutation(len(rows))[:count]
        ids = [rows[index] for index in chosen]
        if len(ids) < count:
            raise ValueError(f"{case.lengths} has {len(ids)} pairs, and {count} are needed")
    else:
        bounds = {
            "prompt-heavy": ((200, 600), (100, 200)),
            "response-heavy": ((40, 80), (200, 400)),
            "long": ((1000, 2500), (300, 900)),
            "tiny": ((4, 12), (3, 9)),
        }
        prompt, response = bounds[case.lengths]
        ids = [
            tuple(
                random.integers(1, case.vocabulary, random.integers(*lengths, endpoint=True)).tolist()
                for lengths in (prompt, response, response)
            )
            for _ in range(count)
        ]
    # What random weights give: log-probs around -ln(vocabulary) a token. A few nats off it, so that losses differ.
    uniform = -float(np.log(case.vocabulary))
    return [Pair(*parts, *(uniform * len(part) + float(random.normal(0, 5)) for part in parts[1:])) for parts in ids]


def _real_ids(name: str, folder: Path) -> list[tuple[list[int], ...]]:
    """(prompt, chosen, rejected) of every row, tokenised as a run would."""
    from transformers import AutoTokenizer

    from dpo_cli.data.prepare import prepare_data
    from dpo_cli.data.settings import DataSettings

    tokenizer = AutoTokenizer.from_pretrained(folder / "qwen2-tokenizer")
    with tempfile.TemporaryDirectory() as scratch:
        settings = DataSettings(str(folder / "preferences" / "dpo_en_demo.json"), max_tokens=1024)
        if name == "gsm8k":
            path = Path(scratch) / "pairs.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in _gsm8k_rows(folder)), encoding="utf-8")
            settings = DataSettings(str(path), max_tokens=1024)
        stops = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
        store = Path(scratch)
        train = prepare_data(settings, tokenizer, kind="pair", stop_token_ids=stops, seed=0, store_dir=store).train
        examples = [train[index] for index in range(len(train))]
    return [tuple(part.tolist() for part in (example.prompt, *example.responses)) for example in examples]


def _gsm8k_rows(folder: Path) -> list[dict[str, str]]:
    """Every problem's ground truth against the first solution that is marked wrong."""
    rows = []
    for line in (folder / "gsm8k" / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        tried = [value for value in problem.values() if isinstance(value, dict)]
        wrong = next((each["solution"] for each in tried if not each["is_correct"]), None)
        if wrong is not None:
            prompt = f"Question: {problem['question']}\n\nAnswer:\n"
            rows.append({"prompt": prompt, "chosen": problem["ground_truth"], "rejected": wrong})
    return rows


def save(case: StepCase, pairs: list[Pair], path: Path) -> None:
    """Write what one side needs to know."""
    path.write_text(json.dumps({"case": asdict(case), "pairs": [asdict(pair) for pair in pairs]}), encoding="utf-8")


def load(path: Path) -> tuple[StepCase, list[Pair]]:
    told = json.loads(path.read_text(encoding="utf-8"))
    return StepCase(**told["case"]), [Pair(**pair) for pair in told["pairs"]]
