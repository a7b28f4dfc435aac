"""Binary classifier optimisation for pairs: each response judged by itself, against the batch's mean reward."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare(couples_batch=True)
def bco_pair_loss(
    pair: PairLogps, *, beta: float, reward_shift: Literal["batch_mean", "none"] = "batch_mean"
) -> LossValues:
    """Classify responses as chosen or rejected by their implicit reward, with the logit at the batch's mean reward.

        reward(y) = beta * log(policy(y|x) / reference(y|x))
        shift     = mean of the rewards of all chosen and all rejected responses of the batch; 0 with reward_shift=none
        value     = -log sigmoid(reward(chosen) - shift) - log sigmoid(shift - reward(rejected))

    The shift follows rewards that drift together, which would satisfy one half of the loss and strain the other. No
    gradient flows through it. It is a mean over what is given, so this loss must be handed the whole global batch at
    once (couples_batch). The authors keep a moving average over batches instead; a mean over this batch needs no memory
    from step to step.

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    reward_shift: batch_mean is the paper's loss up to how the mean is estimated; none is TRL 1.16's.
    Returns values (pairs,), unreduced; rewards are detached; part reward_shift repeats the shift. Starts at 2 log 2.
    Raises LossInputError when reference logps are absent.
    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    chosen, rejected = (beta * ratio for ratio in pair_log_ratios(pair))
    mean = ((chosen + rejected) / 2).detach().mean()
    shift = mean if reward_shift == "batch_mean" else torch.zeros_like(mean)
    values = -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected)
    return LossValues(values, (chosen.detach(), rejected.detach()), {"reward_shift": shift.expand_as(values)})
