"""What losses take, what they give back, and what they declare about themselves.

All log-probs are sums over response tokens in nats (weighted sums where token weights are in use); `tokens` is the
number of response tokens of each (the sum of their weights), so that a loss which averages divides for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Normaliser = Literal["pairs", "tokens"]
# What one training example is for a loss: the data room prepares rows accordingly.
ExampleKind = Literal["pair", "ranked", "unpaired", "demonstration"]


@dataclass(frozen=True)
class PairLogps:
    """Preference pairs. Every tensor is (pairs,); reference fields are None for losses that need no reference."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass(frozen=True)
class RankedLogps:
    """Ranked responses, best first. Tensors are (prompts, K); `present` (bool) is False where a prompt has fewer."""

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor
    present: Tensor


@dataclass(frozen=True)
class UnpairedLogps:
    """Single responses with a verdict (KTO). Tensors are (examples,); `desirable` is bool.

    kl_policy, kl_reference: log-probs of a response that belongs to ANOTHER prompt, for the estimate of the
    divergence from the reference.
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor
    desirable: Tensor
    kl_policy: Tensor
    kl_reference: Tensor | None


@dataclass(frozen=True)
class DemonstrationLogps:
    """Responses to imitate. Tensors are (examples,)."""

    policy: Tensor
    tokens: Tensor


LossInput = PairLogps | RankedLogps | UnpairedLogps | DemonstrationLogps


@dataclass(frozen=True)
class LossValues:
    """What a loss gives back, unreduced: the loop divides the sum by the global normaliser, once.

    values: (n,) differentiable. Their sum over the global batch, divided by its normaliser, is the loss.
    rewards: detached implicit rewards; for pairs a (chosen, rejected) couple of (n,), for ranked responses one
        (n, K), for unpaired ones one (n,), None where the loss has no such notion.
    parts: detached per-example terms worth a curve of their own, by metric name, e.g. {"loss/nll": (n,)}.
    """

    values: Tensor
    rewards: Tensor | tuple[Tensor, Tensor] | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Declaration:
    """What the training loop must know of a loss before it can run it.

    takes: the input type, which also decides how data rows become examples.
    normaliser: "pairs" divides the summed values by the examples of the global batch, "tokens" by the (weighted)
        response tokens that were scored in it.
    needs_reference: reference log-probs are scored (or read) before training.
    couples_batch: a value depends on other examples of the global batch, so the loss must see all of it at once.
    """

    takes: type
    normaliser: Normaliser = "pairs"
    needs_reference: bool = True
    couples_batch: bool = False

    @property
    def kind(self) -> ExampleKind:
        return _KINDS[self.takes]


_KINDS: dict[type, ExampleKind] = {
    PairLogps: "pair",
    RankedLogps: "ranked",
    UnpairedLogps: "unpaired",
    DemonstrationLogps: "demonstration",
}

LossFunction = TypeVar("LossFunction", bound=Callable[..., LossValues])


def declare(
    *, normaliser: Normaliser = "pairs", needs_reference: bool = True, couples_batch: bool = False
) -> Callable[[LossFunction], LossFunction]:
    """Attach a Declaration to a loss; the input type is read from the annotation of its first parameter."""

    def attach(function: LossFunction) -> LossFunction:
        function.declaration = Declaration(  # type: ignore[attr-defined]
            takes=_input_type(function),
            normaliser=normaliser,
            needs_reference=needs_reference,
            couples_batch=couples_batch,
        )
        return function

    return attach


def declaration_of(function: Callable[..., Any]) -> Declaration:
    """The loss's own declaration; an undeclared function counts as an ordinary loss with a reference."""
    while hasattr(function, "func"):  # functools.partial, as Hydra's `_partial_` makes it
        function = function.func
    declared = getattr(function, "declaration", None)
    return declared if declared is not None else Declaration(takes=_input_type(function))


def _input_type(function: Callable[..., Any]) -> type:
    first = next(iter(inspect.signature(function, eval_str=True).parameters.values()), None)
    if first is None or first.annotation not in _KINDS:
        return PairLogps
    return first.annotation


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` holds; 0 where nothing does."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
