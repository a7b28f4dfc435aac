"""ORPO: imitation and preference in one loss, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(needs_reference=False)
def orpo_loss(pair: PairLogps, *, beta: float) -> LossValues:
    """Imitate the chosen response and make its odds exceed those of the rejected one.

        p(y)      = policy(y|x) ** (1 / tokens(y)),  the geometric mean of its token probabilities
        odds(y)   = p(y) / (1 - p(y))
        value     = -log p(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))

    The NLL covers the response only and is divided by its own length, so every pair counts alike.

    pair: summed logps in nats, each (pairs,); reference logps are not read.
    beta: >= 0, the paper's lambda: the weight of the odds term, not a pull towards anything.
    Returns values (pairs,), unreduced; rewards beta * log p(y) are detached; parts loss/nll and loss/odds_ratio
    (before its weight). Has no fixed start value.
    Source: Hong et al. 2024, eq. 4, 6 and 7, arXiv:2403.07691.
    """
    chosen = pair.policy_chosen / pair.chosen_tokens
    rejected = pair.policy_rejected / pair.rejected_tokens
    odds_ratio = -F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    rewards = ((beta * chosen).detach(), (beta * rejected).detach())
    parts = {"loss/nll": -chosen.detach(), "loss/odds_ratio": odds_ratio.detach()}
    return LossValues(-chosen + beta * odds_ratio, rewards, parts)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    # A response the model is certain of has log p = 0 and infinite odds, whose gradient would be NaN.
    certain = -torch.finfo(log_p.dtype).eps
    return log_p - torch.log(-torch.expm1(log_p.clamp(max=certain)))
