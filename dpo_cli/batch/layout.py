"""One row of tokens per micro-batch: every prompt once, then each of its responses. No padding.

    tokens     p p p p  a a a  b b  |  q q  c c  d d d        two prompts, two responses each
    positions  0 1 2 3  4 5 6  4 5  |  0 1  2 3  2 3 4        every response restarts at len(prompt)

A response sees its prompt and itself, nothing else, so its log-probs are those of a plain forward over
prompt + response, and a prompt shared by K responses is computed once. The first token of EVERY response is predicted
by the last position of the prompt. The last token of a response predicts nothing and is therefore not an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.batch.transfer import to_device


class Segment(NamedTuple):
    """Queries [query_start, query_end) attend to keys [prefix_start, prefix_end) and, causally, to themselves."""

    query_start: int
    query_end: int
    prefix_start: int
    prefix_end: int


class PromptWithResponses(Protocol):
    """What a layout is made of; `data.Example` is one."""

    @property
    def prompt(self) -> NDArray[np.int32]: ...
    @property
    def responses(self) -> tuple[NDArray[np.int32], ...]: ...
    @property
    def weights(self) -> tuple[NDArray[np.float32], ...] | None: ...


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch as one row. T input tokens, R response tokens to score, N responses.

    input_ids, position_ids: (T,) int64.
    segments: who attends to whom; their queries cover the row exactly once, in order.
    scored_segments: the same of the rows in `scored` alone, which are all that the last layer needs.
    predictors: (R,) index into the row of the position that predicts each response token.
    scored: (S,) ascending, the distinct ones of `predictors`.
    targets: (R,) ids of the response tokens, response after response.
    response_of_token: (R,) which of the N responses a token belongs to.
    token_weights: (R,) float32, or None for all ones.
    responses_per_example: N split by example.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    scored_segments: tuple[Segment, ...]
    predictors: Tensor
    scored: Tensor
    targets: Tensor
    response_of_token: Tensor
    token_weights: Tensor | None
    responses_per_example: tuple[int, ...]

    @property
    def responses(self) -> int:
        return sum(self.responses_per_example)

    def to(self, device: torch.device) -> PackedRow:
        def move(tensor: Tensor) -> Tensor:
            return to_device(tensor, device)

        return PackedRow(
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            segments=self.segments,
            scored_segments=self.scored_segments,
            predictors=move(self.predictors),
            scored=move(self.scored),
            targets=move(self.targets),
            response_of_token=move(self.response_of_token),
            token_weights=None if self.token_weights is None else move(self.token_weights),
            responses_per_example=self.responses_per_example,
        )


def pack(examples: Sequence[PromptWithResponses], *, first_responses: int | None = None) -> PackedRow:
    """Lay examples out as one packed row.

    first_responses: take only that many responses of each example (None: all of them).
    """
    inputs: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    segments: list[Segment] = []
    scored_segments: list[Segment] = []
    predictors: list[NDArray[np.int64]] = []
    scored: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float32]] = []
    counts: list[int] = []
    weighted = any(example.weights is not None for example in examples)

    cursor = 0
    for example in examples:
        prompt, responses = example.prompt, example.responses[:first_responses]
        prompt_start, prompt_end = cursor, cursor + len(prompt)
        inputs.append(prompt)
        positions.append(np.arange(len(prompt)))
        cursor = prompt_end
        for number, response in enumerate(responses):
            start, cursor = cursor, cursor + len(response) - 1
            inputs.append(response[:-1])
            positions.append(np.arange(len(prompt), len(prompt) + len(response) - 1))
            # The first response continues its prompt in one causal segment; the others look back at it as a prefix.
            if number == 0:
                segments.append(Segment(prompt_start, cursor, prompt_start, prompt_start))
                scored_segments.append(Segment(prompt_end - 1, cursor, prompt_start, prompt_end - 1))
            elif len(response) > 1:
                segments.append(Segment(start, cursor, prompt_start, prompt_end))
                scored_segments.append(segments[-1])
            predictors.append(np.concatenate(([prompt_end - 1], np.arange(start, cursor))))
            targets.append(response)
            if weighted:
                weights.append(
                    example.weights[number] if example.weights is not None else np.ones(len(response), np.float32)
                )
        scored.append(np.arange(prompt_end - 1, cursor))
        counts.append(len(responses))

    lengths = [len(target) for target in targets]
    return PackedRow(
        input_ids=_int64(inputs),
        position_ids=_int64(positions),
        segments=tuple(segments),
        scored_segments=tuple(scored_segments),
        predictors=_int64(predictors),
        scored=_int64(scored),
        targets=_int64(targets),
        response_of_token=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        token_weights=torch.from_numpy(np.concatenate(weights)) if weighted else None,
        responses_per_example=tuple(counts),
    )


def padded(row: PackedRow, multiple: int) -> PackedRow:
    """The row with as many tokens more as make a multiple; they see one another and are seen by nothing that counts."""
    tokens = len(row.input_ids)
    missing = -tokens % multiple
    if not missing:
        return row
    return replace(
        row,
        input_ids=F.pad(row.input_ids, (0, missing)),
        position_ids=torch.cat((row.position_ids, torch.arange(missing, device=row.position_ids.device))),
        segments=(*row.segments, Segment(tokens, tokens + missing, tokens, tokens)),
    )


def _int64(parts: Sequence[NDArray[np.integer]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def sum_by_response(row: PackedRow, per_token: Tensor) -> Tensor:
    """(R,) token values to (N,) weighted sums, in float64: a margin is a small difference of large sums."""
    values = per_token.double()
    if row.token_weights is not None:
        values = values * row.token_weights
    sums = torch.zeros(row.responses, dtype=torch.float64, device=per_token.device)
    return sums.index_add(0, row.response_of_token, values)


def tokens_by_response(row: PackedRow) -> Tensor:
    """(N,) float64: the tokens of each response, or the sum of their weights."""
    return sum_by_response(row, torch.ones_like(row.targets, dtype=torch.float32))
