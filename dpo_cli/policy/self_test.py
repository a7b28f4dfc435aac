"""Packed scoring against the model's own plain forward, at the start of every run.

What a new architecture does between its embeddings and its logits cannot be known in advance. A packed row that is
wrong for it gives log-probs that look fine and are off by nats; this turns them into an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.batch.layout import pack
from dpo_cli.errors import ModelError
from dpo_cli.policy.attention import PACKED_ATTENTION
from dpo_cli.policy.compatibility import sliding_window
from dpo_cli.policy.packed_model import PackedModel

# Mean |difference| of a token's log-prob, in nats, that the dtype alone explains. Wrong masks or positions move it by
# 0.1 (untrained models) to several nats.
TOLERANCE_NATS = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.25}
# Plain attention written out in full: the route that knows everything an architecture adds to its attention.
_PLAIN_ROUTE = "eager"
_PROMPT_TOKENS = (17, 6)
_RESPONSE_TOKENS = ((9, 5), (4, 12))
# Longer windows would need rows that cost more than the test is worth.
_LONGEST_WINDOW_TESTED = {"cuda": 1024, "cpu": 128}


@dataclass(frozen=True)
class _Row:
    prompt: NDArray[np.int32]
    responses: tuple[NDArray[np.int32], ...]
    weights: None = None


@dataclass(frozen=True)
class SelfTest:
    """What was found: mean and largest |difference| of a token's log-prob in nats, over `tokens` tokens.

    window_tested: whether the rows were longer than the model's sliding window; None for a model without one.
    """

    mean_difference: float
    largest_difference: float
    tokens: int
    window_tested: bool | None


def packed_self_test(packed: PackedModel, *, vocabulary: int, where: str, seed: int = 0) -> SelfTest:
    """Score two short random prompts with two responses each, packed and plainly, and compare token by token.

    vocabulary: token ids below it are used. Leaves the model as it was, its random state included.
    Raises ModelError when they differ by more than the dtype explains.
    """
    model: Any = packed.model
    window = sliding_window(model.config)
    fits = window is not None and window <= _LONGEST_WINDOW_TESTED.get(packed.device.type, 128)
    rows = _random_rows(vocabulary, longer_by=window if fits and window is not None else 0, seed=seed)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scored = packed(pack(rows)).logps.double().cpu()
            with _plain_attention(model):
                plain = torch.cat([_plain_logps(model, row) for row in rows])
    finally:
        model.train(training)
    difference = (scored - plain).abs()
    result = SelfTest(
        mean_difference=difference.mean().item(),
        largest_difference=difference.max().item(),
        tokens=len(difference),
        window_tested=fits if window is not None else None,
    )
    # `not <=`, so that NaN fails.
    if not result.mean_difference <= TOLERANCE_NATS[model.dtype]:
        raise ModelError(
            f"Packed rows score {type(model).__name__} wrongly: its token log-probs differ by "
            f"{result.mean_difference:.3g} nats on average from a plain forward "
            f"(explained by {model.dtype}: {TOLERANCE_NATS[model.dtype]:g}).",
            where=where,
            hint="this architecture is not supported; please report it with its config.json",
        )
    return result


def _random_rows(vocabulary: int, *, longer_by: int, seed: int) -> list[_Row]:
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> NDArray[np.int32]:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    return [
        _Row(prompt=tokens(prompt + longer_by), responses=tuple(map(tokens, responses)))
        for prompt, responses in zip(_PROMPT_TOKENS, _RESPONSE_TOKENS, strict=True)
    ]


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    model.set_attn_implementation(_PLAIN_ROUTE)
    try:
        yield
    finally:
        model.set_attn_implementation(PACKED_ATTENTION)


def _plain_logps(model: Any, row: _Row) -> Tensor:
    """Each [prompt + response] alone in a forward pass of its own: nothing to pad, nothing to keep apart."""
    logps = []
    for response in row.responses:
        ids = torch.from_numpy(np.concatenate((row.prompt, response)).astype(np.int64))
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        targets = ids[len(row.prompt) :, None]
        logps.append(logits.double().cpu().log_softmax(-1).gather(-1, targets)[:, 0])
    return torch.cat(logps)
