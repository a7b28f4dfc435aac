"""A weighted sum of losses on the same pairs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpo_cli.errors import LossInputError
from dpo_cli.losses.types import (
    Declaration,
    DemonstrationLogps,
    LossValues,
    PairLogps,
    as_loss_values,
    declaration_of,
    declare,
)


def _declaration(declared: Declaration, parameters: Mapping[str, Any]) -> Declaration:
    """What the parts need, together."""
    parts = [part.declaration for part in _parts(parameters["losses"], beta=parameters["beta"])]
    return replace(
        declared,
        needs_reference=any(part.needs_reference for part in parts),
        couples_batch=any(part.couples_batch for part in parts),
        statistics=frozenset().union(*(part.statistics for part in parts)),
    )


@declare(from_parameters=_declaration)
def mix_loss(pair: PairLogps, *, beta: float, losses: Sequence[Mapping[str, Any]]) -> LossValues:
    """Add several losses of the same pairs, each with its weight, as mixed preference optimisation does.

        value = sum over parts of weight * value of the part

    A part that imitates (sft_ref) is given the chosen response and its value divided by the response's own tokens, so
    that every pair counts alike, as in the NLL term of other losses.

    pair: summed logps in nats, each (pairs,). beta: of every part that takes one and does not set its own.
    losses: for each part {loss, weight} and the parameters it needs or wants otherwise. loss: a name of ours or the
        dotted path of a function; weight > 0.
    Returns values (pairs,), unreduced; the rewards of the first part that has some; for each part loss/NAME (before its
    weight). Starts at the weighted sum of the parts' start values.
    Raises LossInputError when parts cannot be added: other than on pairs, the same one twice, on-policy ones.
    Source: MPO, Wang et al. 2024, arXiv:2411.10442, with 0.8 dpo, 0.2 bco_pair and 1 imitation.
    """
    parts = _parts(losses, beta=beta)
    results = [part.of(pair) for part in parts]
    values = torch.stack([part.weight * result.values for part, result in zip(parts, results, strict=True)]).sum(dim=0)
    rewards = next((result.rewards for result in results if result.rewards is not None), None)
    named = {f"loss/{part.name}": result.values.detach() for part, result in zip(parts, results, strict=True)}
    return LossValues(values, rewards, named)


@dataclass(frozen=True)
class _Part:
    name: str
    weight: float
    loss: Callable[..., Any]

    @property
    def declaration(self) -> Declaration:
        return declaration_of(self.loss)

    def of(self, pair: PairLogps) -> LossValues:
        if self.declaration.takes is PairLogps:
            return as_loss_values(self.loss(pair), len(pair.policy_chosen))
        statistics = {name: sums[:, 0] for name, sums in pair.statistics.items()}
        demonstration = DemonstrationLogps(pair.policy_chosen, pair.chosen_tokens, statistics)
        result = as_loss_values(self.loss(demonstration), len(pair.policy_chosen))
        if self.declaration.normaliser == "tokens":
            return replace(result, values=result.values / pair.chosen_tokens)
        return result


def _parts(losses: Sequence[Mapping[str, Any]], *, beta: float) -> list[_Part]:
    parts = [_part(entry, beta=beta) for entry in losses]
    names = [part.name for part in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise LossInputError(f"loss.losses names {min(twice)} twice.", hint="one part with the sum of their weights")
    return parts


def _part(entry: Mapping[str, Any], *, beta: float) -> _Part:
    path, weight = str(entry["loss"]), float(entry["weight"])
    module, _, name = path.rpartition(".") if "." in path else (f"dpo_cli.losses.{path}", "", f"{path}_loss")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise LossInputError(f"A part of the mix cannot be imported: {error}.", where="loss.losses") from error
    parameters = {key: value for key, value in entry.items() if key not in ("loss", "weight")}
    if "beta" in inspect.signature(function).parameters:
        parameters.setdefault("beta", beta)
    part = _Part(name.removesuffix("_loss"), weight, functools.partial(function, **parameters))
    if problem := _cannot_be_added(part.declaration):
        raise LossInputError(f"{part.name} cannot be part of a mix: {problem}.", where="loss.losses")
    return part


def _cannot_be_added(declaration: Declaration) -> str | None:
    if declaration.takes not in (PairLogps, DemonstrationLogps):
        return "it does not take pairs"
    if declaration.takes is PairLogps and declaration.normaliser != "pairs":
        return "it is not divided by pairs"
    if declaration.on_policy:
        return "it learns from samples as well"
    if declaration.tail_weight != 1:
        return "its ld_alpha would change the sums of all parts"
    return None
