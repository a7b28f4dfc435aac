"""Contrastive preference optimisation: DPO without a reference, held by imitation instead."""

from __future__ import annotations

from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(needs_reference=False)
def cpo_loss(pair: PairLogps, *, beta: float, nll_alpha: float = 1.0, label_smoothing: float = 0.0) -> LossValues:
    """Make the chosen response likelier than the rejected one, and likelier in itself.

        margin = beta * (log policy(chosen|x) - log policy(rejected|x))
        value  = -(1 - e) * log sigmoid(margin) - e * log sigmoid(-margin) + nll_alpha * -log policy(chosen|x) / tokens,
        e = label_smoothing

    It is DPO with a uniform reference, whose pull the imitation replaces. Each response's NLL is divided by its own
    length, so every pair counts alike. SimPO with nll_alpha is its length-normalised relative (CPO-SimPO).

    pair: summed logps in nats, each (pairs,); reference logps are not read.
    beta: > 0, in 1/nats. nll_alpha: >= 0, weight of imitation; 1 in the paper.
    label_smoothing: in [0, 0.5), the assumed share of labels that are the wrong way round.
    Returns values (pairs,), unreduced; rewards beta * log policy(y|x) are detached; parts loss/cpo and, where nll_alpha
    is not 0, loss/nll (before its weight). Has no fixed start value.
    Source: Xu et al. 2024, arXiv:2401.08417.
    """
    result = dpo_loss(pair, beta=beta, label_smoothing=label_smoothing, nll_alpha=nll_alpha, reference_free=True)
    parts = dict(result.parts)
    parts["loss/cpo"] = parts.pop("loss/dpo", result.values.detach())
    return LossValues(result.values, result.rewards, parts)
