"""What losses take, what they give back, and what they declare about themselves.

All log-probs are sums over response tokens in nats (weighted sums where token weights are in use); `tokens` is the
number of response tokens of each (the sum of their weights), so that a loss which averages divides for itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor

from dpo_cli.errors import LossInputError

Normaliser = Literal["pairs", "tokens"]
# What one training example is for a loss: the data room prepares rows accordingly.
ExampleKind = Literal["pair", "ranked", "unpaired", "demonstration"]
# What the output head can tell of each token's distribution beside the target's log-prob: its entropy in nats, whether
# the target was the most probable token, the log of the sum of its squared probabilities (for WPO's weights).
Statistic = Literal["entropy", "correct", "log_sum_squared_probs"]
# By name, sums over the (weighted) tokens of each response, detached.
Statistics = Mapping[Statistic, Tensor]


@dataclass(frozen=True)
class PairLogps:
    """Preference pairs. Every tensor is (pairs,); reference fields are None for losses that need no reference.

    statistics: those the loss declared, each (pairs, 2), chosen first.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class RankedLogps:
    """Ranked responses, best first. Tensors are (prompts, K), those of `statistics` too.

    present: bool, False where a prompt has fewer than K.
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor
    present: Tensor
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class UnpairedLogps:
    """Single responses with a verdict (KTO). Tensors are (examples,); `desirable` is bool.

    kl_policy, kl_reference: log-probs of a response that belongs to ANOTHER prompt, for the estimate of the
    divergence from the reference. statistics: of the responses themselves.
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor
    desirable: Tensor
    kl_policy: Tensor
    kl_reference: Tensor | None
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class DemonstrationLogps:
    """Responses to imitate. Tensors are (examples,)."""

    policy: Tensor
    tokens: Tensor
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class SampleLogps:
    """Responses drawn from the policy, each beside its prompt's ground truth. Tensors are (samples,).

    truth_policy, truth_reference: of the ground truth. prompt: int64, which prompt a sample answers, counted from 0.
    step: of the training, counted from 0.
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor
    truth_policy: Tensor
    truth_reference: Tensor | None
    prompt: Tensor
    step: int


LossInput = PairLogps | RankedLogps | UnpairedLogps | DemonstrationLogps | SampleLogps


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
    statistics: what else the output head must tell of the policy; the loss finds it in its input's `statistics`.
    on_policy: the loss is also given SampleLogps, responses that the policy has just drawn, and its values for them,
        divided by their number, are added.
    tail_weight: what the tokens of a response beyond the length of the other weigh in the sums of a pair.
    """

    takes: type
    normaliser: Normaliser = "pairs"
    needs_reference: bool = True
    couples_batch: bool = False
    statistics: frozenset[Statistic] = frozenset()
    on_policy: bool = False
    tail_weight: float = 1.0

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
    *,
    normaliser: Normaliser = "pairs",
    needs_reference: bool = True,
    couples_batch: bool = False,
    statistics: Collection[Statistic] = (),
    on_policy: bool = False,
    from_parameters: Callable[[Declaration, Mapping[str, Any]], Declaration] | None = None,
) -> Callable[[LossFunction], LossFunction]:
    """Attach a Declaration to a loss; the input type is read from the annotation of its first parameter.

    That of an on-policy loss is `PairLogps | SampleLogps`, or another kind in the first place.
    from_parameters: what becomes of the declaration once all parameters are bound, where it depends on them.
    """

    def attach(function: LossFunction) -> LossFunction:
        function.declaration = Declaration(  # type: ignore[attr-defined]
            takes=_input_type(function),
            normaliser=normaliser,
            needs_reference=needs_reference,
            couples_batch=couples_batch,
            statistics=frozenset(statistics),
            on_policy=on_policy,
        )
        function.from_parameters = from_parameters  # type: ignore[attr-defined]
        return function

    return attach


def declaration_of(function: Callable[..., Any]) -> Declaration:
    """The loss's own declaration; an undeclared function counts as an ordinary loss with a reference.

    function: the loss, or a functools.partial of it that holds its parameters, as Hydra's `_partial_` makes it.
    Whatever it declares, a loss whose `reference_free` parameter is set needs no reference, one whose `gamma` is 0 no
    samples; one whose `use_weighting` is set is told log_sum_squared_probs, and the `ld_alpha` of one on pairs is its
    tail weight.
    """
    bare = function
    while isinstance(bare, functools.partial):
        bare = bare.func
    declared: Declaration | None = getattr(bare, "declaration", None)
    declaration = declared if declared is not None else Declaration(takes=_input_type(bare))
    # The signature of a partial shows the parameters it holds as defaults.
    given = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    from_parameters = getattr(bare, "from_parameters", None)
    if from_parameters is not None and isinstance(function, functools.partial):
        declaration = from_parameters(declaration, given)
    if _is_set(given.get("reference_free")):
        declaration = replace(declaration, needs_reference=False)
    if _is_set(given.get("use_weighting")):
        declaration = replace(declaration, statistics=declaration.statistics | {"log_sum_squared_probs"})
    ld_alpha = given.get("ld_alpha")
    if isinstance(ld_alpha, int | float) and declaration.takes is PairLogps:
        declaration = replace(declaration, tail_weight=float(ld_alpha))
    if declaration.on_policy and given.get("gamma") == 0:
        declaration = replace(declaration, on_policy=False)
    return declaration


def _is_set(value: object) -> bool:
    return value not in (inspect.Parameter.empty, False, None)


def _input_type(function: Callable[..., Any]) -> type:
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # an annotation whose name is imported for type checkers only
        signature = inspect.signature(function)
    first = next(iter(signature.parameters.values()), None)
    annotation = None if first is None else first.annotation
    # A string that could not be evaluated still says the name: "PairLogps" or "types.PairLogps".
    union = [part.strip() for part in annotation.split("|")] if isinstance(annotation, str) else get_args(annotation)
    for kind in union or (annotation,):
        for input_type in _KINDS:
            if kind is input_type or (isinstance(kind, str) and kind.rpartition(".")[2] == input_type.__name__):
                return input_type
    return PairLogps


def as_loss_values(result: object, n: int) -> LossValues:
    """What a loss returned, checked: one value for each of the n examples, everything else detached.

    result: LossValues, or the bare tensor of values (n,), which is all that a user's own loss has to return.
    Raises LossInputError for anything else, a reduced loss above all: only the loop knows the global normaliser.
    """
    if isinstance(result, Tensor):
        result = LossValues(values=result)
    if not isinstance(result, LossValues):
        raise LossInputError(
            f"The loss returned {type(result).__name__}, not LossValues or a tensor.",
            hint="return one value per example: a tensor of shape (examples,)",
        )
    _check_shape("values", result.values, n)
    if not result.values.is_floating_point():
        raise LossInputError(f"The loss returned {result.values.dtype} values, which have no gradient.")
    rewards = result.rewards
    if isinstance(rewards, Tensor):
        _check_shape("rewards", rewards, n, leading_only=True)
        rewards = rewards.detach()
    elif rewards is not None:
        chosen, rejected = rewards
        _check_shape("rewards of chosen", chosen, n)
        _check_shape("rewards of rejected", rejected, n)
        rewards = (chosen.detach(), rejected.detach())
    for name, part in result.parts.items():
        _check_shape(f"part {name!r}", part, n)
    return LossValues(result.values, rewards, {name: part.detach() for name, part in result.parts.items()})


def _check_shape(what: str, tensor: Tensor, n: int, *, leading_only: bool = False) -> None:
    shape = tuple(tensor.shape[:1] if leading_only else tensor.shape)
    if shape != (n,):
        raise LossInputError(
            f"The loss returned {what} of shape {tuple(tensor.shape)} for {n} examples.",
            hint=f"return one value per example, shape ({n},), not their mean or sum: the training loop divides once",
        )
