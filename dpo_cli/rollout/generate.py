"""Responses of a model to prompts: batched greedy decoding, and sampling that a seed makes repeatable.

Both go through transformers' `generate` with a key-value cache and left padding, and with the model's own generation
config set aside: a forgotten repetition penalty or a top-k in it would silently decide what is measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

IntArray = NDArray[np.int32]

# Prompt and response tokens in one batch: enough rows for a small model to run at full speed, and a cache of one or
# two gigabytes for a model of seven billion parameters.
BATCH_TOKENS = 32_768


def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[IntArray]:
    """The most probable continuation, token by token, of every prompt, in the order given.

    prompts: token ids, each (tokens,), at least one.
    stop_token_ids: a response ends with the first of these, which is kept.
    batch_tokens: rows x (longest prompt + max_new_tokens) that go through the model together.
    """
    with _generating(model):
        return _in_batches(
            model, prompts, None, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, pad_id=pad_id,
            batch_tokens=batch_tokens,
        )  # fmt: skip


def sample(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    *,
    samples_per_prompt: int,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    pad_id: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[IntArray]]:
    """`samples_per_prompt` independent draws from the model's own distribution at a temperature > 0.

    A draw is a function of (seed, place of the prompt, number of the sample) and the model alone: it depends on the
    batch it falls into only as far as the logits do in their last bits.
    Responses end as in `generate_greedy`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}; generate_greedy is its limit.")
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    with _generating(model):
        flat = _in_batches(
            model, repeated, _Noise(seed, temperature), max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids,
            pad_id=pad_id, batch_tokens=batch_tokens,
        )  # fmt: skip
    return [flat[start : start + samples_per_prompt] for start in range(0, len(flat), samples_per_prompt)]


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no gradient, and a blank generation config; everything is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    own = model.generation_config
    # A config handed to generate() is still filled up from the model's own wherever it says nothing.
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


def _in_batches(
    model: PreTrainedModel,
    prompts: Sequence[IntArray],
    noise: _Noise | None,
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    pad_id: int,
    batch_tokens: int,
) -> list[IntArray]:
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stop_token_ids),
        pad_token_id=pad_id,
    )
    responses: list[IntArray | None] = [None] * len(prompts)
    # Longest first: what will not fit in memory fails at once. Equal lengths lie together, so little is padded.
    by_length = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    start = 0
    while start < len(by_length):
        width = len(prompts[by_length[start]])
        places = by_length[start : start + max(1, batch_tokens // (width + max_new_tokens))]
        start += len(places)
        ids, seen = _pad_left([prompts[place] for place in places], width, pad_id)
        processors = LogitsProcessorList([] if noise is None else [noise.for_rows(places, width, model.device)])
        generated = model.generate(
            ids.to(model.device),
            attention_mask=seen.to(model.device),
            generation_config=settings,
            logits_processor=processors,
        )
        for place, row in zip(places, generated[:, width:].cpu().numpy().astype(np.int32), strict=True):
            responses[place] = _until_stop(row, stop_token_ids)
    return [response for response in responses if response is not None]


def _pad_left(prompts: Sequence[IntArray], width: int, pad_id: int) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        seen[row, width - len(prompt) :] = 1
    return ids, seen


def _until_stop(row: IntArray, stop_token_ids: Collection[int]) -> IntArray:
    """Cut after the first stop token. Judged by stop tokens alone: a padding id may be one that the model also says."""
    stops = np.flatnonzero(np.isin(row, list(stop_token_ids)))
    return row[: stops[0] + 1] if len(stops) else row


class _Noise:
    """Sampling as the argmax of logits / temperature + Gumbel noise, the noise a function of its place.

    `generate` draws one multinomial for all rows of a batch, so that a row's sample would depend on its neighbours.
    """

    def __init__(self, seed: int, temperature: float) -> None:
        self.seed = seed
        self.temperature = temperature

    def for_rows(self, places: Sequence[int], prompt_width: int, device: torch.device) -> LogitsProcessor:
        rows = torch.tensor(places, dtype=torch.int64, device=device)
        return _GumbelArgmax(_mix(_mix(rows.new_tensor(self.seed)) + rows), prompt_width, self.temperature)


class _GumbelArgmax(LogitsProcessor):
    """keys: (rows,) int64, one stream of noise a row."""

    def __init__(self, keys: Tensor, prompt_width: int, temperature: float) -> None:
        self.keys = keys
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device)
        step_keys = _mix(self.keys + (input_ids.shape[1] - self.prompt_width))
        bits = _mix(step_keys[:, None] + vocabulary)
        # 53 bits, shifted into the open interval: log(0) must not happen.
        uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
        return scores.double() / self.temperature - uniform.log_().neg_().log_()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function over int64 tensors, which wrap around as its 64-bit words do.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15, the odd number nearest 2^64 / golden ratio
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
