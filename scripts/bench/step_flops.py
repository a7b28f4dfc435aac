"""What a step of the benchmark computes: what its pairs need at least, and what TRL makes of them."""

from __future__ import annotations

from step_cases import Pair, StepCase


def needed_flops(case: StepCase, pairs: list[Pair]) -> float:
    """Operations that a step on these pairs cannot do without, forward and backward, the same for every side.

    Every prompt once, no padding, the output head for scored tokens only, nothing computed again.
    """
    return sum(product_flops(case, pair) + attention_flops(case, pair) for pair in pairs)


def product_flops(case: StepCase, pair: Pair) -> float:
    """Of products with weights: 2 operations a weight and token forwards, 4 backwards.

    2 backwards where the weights are frozen; adapters themselves, 1 to 2%, are not counted.
    """
    forward = 2 * case.layers * _layer_weights(case) * sum(_rows(pair))
    # Of the prompt only the last token predicts: of the last layer the others need keys and values, and nothing else.
    forward -= 2 * case.hidden * (3 * case.intermediate + 2 * case.hidden) * (len(pair.prompt) - 1)
    return (forward + _head_flops(case, pair)) * _passes(case)


def attention_flops(case: StepCase, pair: Pair) -> float:
    """Of scores and weighted values, where a query sees the key: twice 2 a channel forwards, twice that backwards."""
    first, second = _rows(pair)
    seen = first * (first + 1) / 2 + second * len(pair.prompt) + second * (second + 1) / 2
    in_prompt = len(pair.prompt) * (len(pair.prompt) - 1) / 2
    return 3 * 4 * case.hidden * (case.layers * seen - in_prompt)


def padded_flops(case: StepCase, pairs: list[Pair]) -> tuple[float, float]:
    """(products, attention) of TRL: every response after a prompt of its own, padded to the micro-batch's longest.

    Its attention has a mask, so that every query meets every key; the head has scored tokens only.
    """
    products = attention = 0.0
    for first in range(0, len(pairs), case.micro_pairs):
        micro = pairs[first : first + case.micro_pairs]
        rows, longest = 2 * len(micro), max(pair.longest for pair in micro)
        forward = 2 * case.layers * _layer_weights(case) * rows * longest
        forward += sum(_head_flops(case, pair) for pair in micro)
        products += forward * _passes(case)
        attention += 3 * 4 * case.layers * case.hidden * rows * longest**2
    return products, attention


def _layer_weights(case: StepCase) -> int:
    width = case.hidden // case.heads
    return case.hidden * width * (2 * case.heads + 2 * case.kv_heads) + 3 * case.hidden * case.intermediate


def _head_flops(case: StepCase, pair: Pair) -> int:
    """Forwards."""
    return 2 * case.hidden * case.vocabulary * (len(pair.chosen) + len(pair.rejected))


def _passes(case: StepCase) -> int:
    """Products of the size of the forward pass's, in both passes; frozen weights have no gradients."""
    return 2 if case.lora_rank else 3


def _rows(pair: Pair) -> tuple[int, int]:
    """Tokens of the prompt with the chosen response, and of the rejected one; what comes last predicts nothing."""
    return len(pair.prompt) + len(pair.chosen) - 1, len(pair.rejected) - 1
