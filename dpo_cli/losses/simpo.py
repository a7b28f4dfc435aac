"""SimPO: a length-averaged reward without a reference."""

from __future__ import annotations

import torch.nn.functional as F

from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(needs_reference=False)
def simpo_loss(pair: PairLogps, *, beta: float, gamma: float) -> LossValues:
    """Make the chosen response likelier per token than the rejected one, by a target margin.

        reward(y) = beta * log policy(y|x) / tokens(y)
        value     = -log sigmoid(reward(chosen) - reward(rejected) - gamma)

    pair: summed logps in nats, each (pairs,); reference logps are not read.
    beta: > 0, in tokens/nat; 2 to 10 in the paper, far above DPO's because rewards are averages.
    gamma: >= 0, the target margin in units of the reward. The authors' code is configured with gamma / beta.
    Returns values (pairs,), unreduced; rewards are detached. Has no fixed start value.
    Source: Meng et al. 2024, eq. 6, arXiv:2405.14734.
    """
    chosen = beta * pair.policy_chosen / pair.chosen_tokens
    rejected = beta * pair.policy_rejected / pair.rejected_tokens
    return LossValues(-F.logsigmoid(chosen - rejected - gamma), (chosen.detach(), rejected.detach()))
