"""DPO for K ranked responses to one prompt."""

from __future__ import annotations

import torch

from dpo_cli.losses.log_ratios import log_ratio
from dpo_cli.losses.types import LossValues, RankedLogps, declare


@declare()
def plackett_luce_loss(ranked: RankedLogps, *, beta: float) -> LossValues:
    """Make the observed ranking likely under the Plackett-Luce model of the implicit rewards.

        reward_k = beta * log(policy(y_k|x) / reference(y_k|x)),  y_1 the best
        value    = -sum over k < K of log( exp(reward_k) / sum over j >= k of exp(reward_j) )

    At K = 2 this is DPO. The value of a prompt is a sum over its K - 1 choices, so prompts with more responses weigh
    more; responses that are not present neither count nor receive a gradient.

    ranked: summed logps in nats, (prompts, K), best first; whatever stands where `present` is False is not read.
    beta: > 0, in 1/nats.
    Returns values (prompts,), unreduced; rewards (prompts, K) are detached, 0 where not present. Starts at log K!.
    Raises LossInputError when reference logps are absent.
    Source: DPO eq. 20 (appendix A.3), arXiv:2305.18290.
    """
    # Selected before any arithmetic: a NaN that is masked afterwards still poisons the gradient.
    rewards = beta * torch.where(ranked.present, log_ratio(ranked.policy, ranked.reference), 0)
    size = rewards.shape[1]
    position = torch.arange(size, device=rewards.device)
    later = position[None, :] > position[:, None]
    # Row k chooses among itself and what comes later. It keeps itself even when absent: a row of nothing but -inf
    # has no gradient. Absent rows are dropped from the sum below.
    itself = position[None, :] == position[:, None]
    candidates = itself | (later & ranked.present[:, None, :])
    pool = torch.where(candidates, rewards[:, None, :], -torch.inf)
    choices = torch.logsumexp(pool, dim=2) - rewards
    values = torch.where(ranked.present, choices, 0).sum(dim=1)
    return LossValues(values, rewards.detach())
