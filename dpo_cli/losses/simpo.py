"""SimPO: a length-averaged reward without a reference."""

from __future__ import annotations

import torch.nn.functional as F

from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(needs_reference=False)
def simpo_loss(pair: PairLogps, *, beta: float, gamma: float, nll_alpha: float = 0.0) -> LossValues:
    """Make the chosen response likelier per token than the rejected one, by a target margin.

        reward(y) = beta * log policy(y|x) / tokens(y)
        value     = -log sigmoid(reward(chosen) - reward(rejected) - gamma) + nll_alpha * -log policy(chosen|x) / tokens

    pair: summed logps in nats, each (pairs,); reference logps are not read.
    beta: > 0, in tokens/nat; 2 to 10 in the paper, far above DPO's because rewards are averages.
    gamma: >= 0, the target margin in units of the reward. The authors' code is configured with gamma / beta.
    nll_alpha: >= 0, weight of imitating the chosen response, each divided by its own length; above 0 it is CPO-SimPO.
    Returns values (pairs,), unreduced; rewards are detached; where nll_alpha is not 0, parts loss/simpo and loss/nll
    (before its weight). Has no fixed start value.
    Source: Meng et al. 2024, eq. 6, arXiv:2405.14734; the NLL term as in CPO, arXiv:2401.08417.
    """
    chosen = beta * pair.policy_chosen / pair.chosen_tokens
    rejected = beta * pair.policy_rejected / pair.rejected_tokens
    values = -F.logsigmoid(chosen - rejected - gamma)
    rewards = (chosen.detach(), rejected.detach())
    if nll_alpha == 0:
        return LossValues(values, rewards)
    nll = -pair.policy_chosen / pair.chosen_tokens
    return LossValues(values + nll_alpha * nll, rewards, {"loss/simpo": values.detach(), "loss/nll": nll.detach()})
