"""Responses of a model to prompts, greedy or sampled, many at a time with a key-value cache.

A prompt is read once however many samples of it are drawn, and a response that has ended leaves the batch. Nothing is
taken from the model's own generation config: a forgotten repetition penalty or a top-k in it would silently decide
what is measured or learnt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.rollout.cache import growing_cache, without_gaps
from dpo_cli.rollout.draft import WIDEST, Draft, Width, may_draft
from dpo_cli.rollout.next_logits import next_logits
from dpo_cli.rollout.noise import mix, uniform

IntArray = NDArray[np.int32]

# Prompt and response tokens in one batch: enough rows for a small model to run at full speed, and a cache of one or
# two gigabytes for a model of seven billion parameters.
BATCH_TOKENS = 32_768
# Ended responses are looked for every so many tokens on a GPU, where looking means waiting for it, ...
_TOKENS_BETWEEN_LOOKS = 8
# ... and dropped from the batch when they are at least this share of it: dropping copies the cache of the others.
_ENDED_SHARE = 0.25


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0: the most probable one, always.

    top_p: only the most probable tokens that together reach this probability. top_k: only so many; 0 for all.
    Equally probable tokens at either edge are kept or dropped together.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @classmethod
    def of(cls, settings: Any) -> Sampling:
        """settings: a section of the config that has all of these keys."""
        return cls(settings.max_new_tokens, settings.temperature, settings.top_p, settings.top_k)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_the_models_own(self) -> bool:
        """Whether samples come from the model's distribution itself."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


def generate(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    sampling: Sampling,
    *,
    samples_per_prompt: int = 1,
    streams: Sequence[int] | None = None,
    stop_token_ids: Collection[int],
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
    drafts: Sequence[IntArray] | None = None,
) -> list[list[IntArray]]:
    """For every prompt, in the order given, its responses as token ids.

    prompts: each (tokens,), at least one.
    streams: for each prompt the key of its random numbers; needed unless `sampling` is greedy. A response is a
        function of that key, the number of the sample and the model alone: it depends on the batch it falls into only
        as far as the logits do in their last bits.
    stop_token_ids: a response ends with the first of these, which is kept; one that ends with another token was cut.
    batch_tokens: responses x (longest prompt + max_new_tokens) that go through the model together.
    drafts: for each prompt a text that its responses are likely to repeat in parts, which saves forward passes as far
        as they do. The responses are the same; see `draft`.
    """
    keys = torch.zeros(len(prompts), dtype=torch.int64)
    if not sampling.greedy:
        if streams is None:
            raise ValueError("sampling needs a stream of random numbers for each prompt")
        keys = torch.tensor(streams, dtype=torch.int64)
    if drafts is not None and not may_draft(model):
        drafts = None
    responses: list[list[IntArray]] = [[] for _ in prompts]
    # Longest first: what will not fit in memory fails at once. Equal lengths lie together, so little is padded.
    by_length = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    wanted = [(place, sample) for place in by_length for sample in range(samples_per_prompt)]
    start = 0
    with _evaluating(model):
        while start < len(wanted):
            width = len(prompts[wanted[start][0]])
            rows = wanted[start : start + max(1, batch_tokens // (width + sampling.max_new_tokens))]
            start += len(rows)
            places = list(dict.fromkeys(place for place, _ in rows))
            owners = {place: number for number, place in enumerate(places)}
            samples = torch.tensor([sample for _, sample in rows])
            decoded = _decode(
                model,
                _pad_left([prompts[place] for place in places], width, pad_id),
                torch.tensor([owners[place] for place, _ in rows]),
                mix(keys[[place for place, _ in rows]] + samples),
                sampling,
                torch.tensor(sorted(stop_token_ids)),
                None
                if drafts is None
                else Draft([drafts[place] for place in places], Width(model, len(rows)), model.device),
            )
            for (place, _), ids in zip(rows, decoded, strict=True):
                responses[place].append(_until_stop(ids, stop_token_ids))
    return responses


@torch.no_grad()
def stream_tokens(
    model: PreTrainedModel, prompt: IntArray, sampling: Sampling, *, stream: int, stop_token_ids: Collection[int]
) -> Iterator[int]:
    """The tokens of one response as they are drawn, the stop token included.

    They are those of the first sample that `generate` draws for a prompt of this stream. The model is in evaluation
    mode.
    """
    device = model.device
    forward, cache = next_logits(model), growing_cache()
    key = mix(torch.tensor([stream])).to(device)
    ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None].to(device)
    seen = torch.ones_like(ids)
    positions = torch.arange(ids.shape[1], device=device)[None]
    for number in range(sampling.max_new_tokens):
        logits = forward(ids, seen, positions, cache, 1)[:, 0]
        ids = _choose(logits, uniform(key, torch.tensor([number], device=device)), sampling)[None]
        token = int(ids)
        yield token
        if token in stop_token_ids:
            return
        seen = torch.cat([seen, seen.new_ones(1, 1)], dim=1)
        positions = positions[:, -1:] + 1


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradient; every module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    # Quicker where an operation costs more than its arithmetic. But what a model makes there and keeps, as code of its
    # own might, could not be trained with.
    known = type(model).__module__.startswith("transformers.")
    try:
        with torch.inference_mode() if known else torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _decode(
    model: PreTrainedModel,
    prompts: tuple[Tensor, Tensor],
    owners: Tensor,
    keys: Tensor,
    sampling: Sampling,
    stops: Tensor,
    draft: Draft | None,
) -> NDArray[np.int32]:
    """(rows, max_new_tokens) ids; what follows a row's first stop token means nothing.

    prompts: padded ids and which of them are there, (prompts, width). owners: (rows,) whose response each row is.
    draft: of each prompt's responses.
    """
    device, longest = model.device, sampling.max_new_tokens
    ids, seen = (part.to(device) for part in prompts)
    owners, keys, stops = owners.to(device), keys.to(device), stops.to(device)
    room = ids.shape[1] + longest
    guesses = ids[:, :0]
    if draft is not None:
        most = min(draft.longest, longest - 1)
        guesses = draft.guess(draft.width.best(len(owners), most, beside=ids.numel()))
        ids, seen = torch.cat([ids, guesses], dim=1), torch.cat([seen, torch.ones_like(guesses)], dim=1)
    forward, cache = next_logits(model), growing_cache()
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    # Of a prompt only the last position's logits are wanted.
    logits = forward(ids, seen, positions, cache, 1 + guesses.shape[1])
    # Of the last token of each prompt.
    start = positions[:, -1 - guesses.shape[1]]
    if len(owners) != len(ids):
        cache.batch_select_indices(owners)
        logits, seen, start, guesses = logits[owners], seen[owners], start[owners], guesses[owners]
        if draft is not None:
            draft.select(owners)

    # Each response after what a draft takes to stand before it, and with room for guesses beyond its end.
    responses = torch.full((len(owners), 3 + longest + WIDEST), Draft.NONE, dtype=torch.int64, device=device)
    rows = torch.arange(len(owners), device=device)
    written, ended = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    draws = torch.empty(len(owners), 0, dtype=torch.float64, device=device)
    if not sampling.greedy:
        draws = uniform(keys, torch.arange(longest, device=device))
    steps = torch.arange(WIDEST, device=device)
    for number in range(longest):
        drafted = guesses.shape[1]
        places = written[:, None] + steps[: drafted + 1]
        chosen = _choose(logits.flatten(0, 1), _at(draws, places), sampling).view_as(places)
        responses[rows[:, None], 3 + places] = chosen
        stopped, agreed = torch.isin(chosen, stops), torch.zeros_like(written)
        if drafted:
            # What is drawn after a guess counts if that guess, and all before it, would have been drawn.
            agreed = (chosen[:, :-1] == guesses).cumprod(1).sum(1)
            stopped &= steps[: drafted + 1] <= agreed[:, None]
        written = torch.where(ended, written, written + agreed + 1).clamp_(max=longest)
        going, ended = ~ended, ended | stopped.any(1) | (written == longest)
        if number + 1 == longest:
            break

        count = most = 0
        if draft is not None:
            told = torch.stack([agreed, written, going, ended]).tolist()
            tested = [agreement for agreement, was_going in zip(told[0], told[2], strict=True) if was_going]
            draft.width.tested(sum(tested), sum(agreement < drafted for agreement in tested))
            most, count = longest - 1 - min(told[1]), sum(told[3])
            if drafted:
                seen[:, -drafted:] = steps[:drafted] < agreed[:, None]
                if surplus := drafted - max(tested):
                    cache.crop(-surplus)
                    seen = seen[:, :-surplus]
        elif device.type == "cpu" or (number + 1) % _TOKENS_BETWEEN_LOOKS == 0:
            count = int(ended.sum())
        if count == len(ended):
            break
        tokens = chosen.gather(1, agreed[:, None])
        if draft is not None:
            draft.follow(responses[rows[:, None], written[:, None] + steps[:3]], agreed + 1)
        if count >= _ENDED_SHARE * len(ended):
            still = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(still)
            tokens, rows, draws, seen, start, written, ended = (
                x[still] for x in (tokens, rows, draws, seen, start, written, ended)
            )
            if draft is not None:
                draft.select(still)
        guesses = tokens[:, :0]
        if draft is not None:
            guesses = draft.guess(draft.width.best(len(rows), most))
            tokens = torch.cat([tokens, guesses], dim=1)
            if seen.shape[1] > room:
                seen = without_gaps(cache, seen)
        seen = torch.cat([seen, torch.ones_like(tokens)], dim=1)
        # Guesses past the longest response are not looked at, and may have no position.
        places = (written[:, None] + steps[: tokens.shape[1]]).clamp_(max=longest)
        logits = forward(tokens, seen, start[:, None] + places, cache, tokens.shape[1])
    return responses[:, 3 : 3 + longest].cpu().numpy().astype(np.int32)


def _at(draws: Tensor, places: Tensor) -> Tensor:
    """(n, 1) the random numbers of these places, (rows, n), as far as there are any."""
    return draws.gather(1, places.clamp(max=draws.shape[1] - 1)).view(-1, 1) if draws.shape[1] else draws


def _choose(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """(rows,) the next token of each response: where its random number falls in the cumulative distribution.

    logits: (rows, vocabulary). draws: (rows, 1) in (0, 1), not looked at when `sampling` is greedy.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    scores = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        lowest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        descending = probabilities.sort(dim=-1, descending=True).values
        before = descending.cumsum(-1) - descending
        # The last token that is needed to reach top_p: the first is always kept.
        kept = (before < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
        probabilities = probabilities.masked_fill(probabilities < descending.gather(-1, kept - 1), 0.0)
    # In float64: the tail of a large vocabulary would be lost in the rounding of a float32 sum.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _pad_left(prompts: Sequence[IntArray], width: int, pad_id: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        seen[row, width - len(prompt) :] = 1
    return ids, seen


def _until_stop(row: IntArray, stop_token_ids: Collection[int]) -> IntArray:
    """Cut after the first stop token. Judged by stop tokens alone: a padding id may be one that the model also says."""
    length = next((place for place, token in enumerate(row.tolist(), 1) if token in stop_token_ids), len(row))
    return row[:length]
