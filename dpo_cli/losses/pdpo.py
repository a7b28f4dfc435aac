"""PDPO: DPO as the discriminator, and an on-policy term in which the policy is its own generator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.log_ratios import log_ratio
from dpo_cli.losses.types import LossValues, PairLogps, SampleLogps, declare

# Log ratios, in nats a response, closer than this are equal: rounding alone tells them apart. At the start of a run all
# are, and without it each sample's gradient there would be a matter of chance, of how rows happen to be packed.
_TIE = 1e-3


@declare(on_policy=True)
def pdpo_loss(
    batch: PairLogps | SampleLogps,
    *,
    beta: float,
    gamma: float,
    gamma_warmup_steps: int = 0,
    generator: Literal["hinge", "unhinged", "policy_gradient"] = "hinge",
    baseline: Literal["truth", "leave_one_out"] = "truth",
    advantage_clip: float = 1.0,
    label_smoothing: float = 0.0,
    nll_alpha: float = 0.0,
) -> LossValues:
    """DPO on preference pairs; on samples y of the policy, beside the ground truth g of their prompt, the generator.

        reward(y) = beta * log(policy(y|x) / reference(y|x))
        gap       = reward(g) - reward(y),  of which log policy(y|x) alone carries gradient

        hinge            value = gamma * max(gap, 0), and 0 where gap <= beta * 0.001, which is rounding
        unhinged         value = gamma * gap
        policy_gradient  value = -gamma * clip(advantage) * log policy(y|x),  no gradient through the advantage

    What they do in expectation, for samples drawn from the policy itself, where E[grad log policy(y|x)] = 0: unhinged
    moves nothing on average. hinge has the expected gradient -gamma * beta * grad P(A), A being the responses that are
    still ranked below the ground truth, held fixed: descending it RAISES their probability, a brake on DPO's pushing
    down. policy_gradient is REINFORCE on the discriminator's reward, which is the policy's own: unclipped, it climbs
    beta * KL(policy, reference), away from the reference in whichever direction the policy has left it already.

    batch: PairLogps give DPO's values (pairs,), SampleLogps the generator's (samples,), both unreduced; the loop
        divides the first by the pairs, the second by the samples that were kept, and adds them.
    beta > 0, in 1/nats. gamma >= 0: the generator's weight; at 0 nothing is sampled and this is DPO.
    gamma_warmup_steps: gamma grows linearly over the first so many steps; 0 for none.
    baseline: what the advantage subtracts from reward(y): the reward of the ground truth, or the mean reward of the
        other samples of the prompt (a prompt with one sample then teaches nothing).
    advantage_clip: > 0, advantages are cut to [-advantage_clip, advantage_clip].
    label_smoothing, nll_alpha: of DPO.
    Returns with pairs the rewards and the part loss/dpo; with samples the parts loss/generator (before its weight),
    generator/active_fraction (of a gap beyond rounding), generator/reward_gap, and generator/kl: the mean of
    log(policy / reference) of samples, which for samples of the policy itself estimates KL(policy, reference) without
    bias, in nats a response.
    Raises LossInputError when reference logps are absent.
    Source: our own; the discriminator is DPO, arXiv:2305.18290, the leave-one-out baseline RLOO, arXiv:2402.14740.
    """
    if isinstance(batch, PairLogps):
        values = dpo_loss(batch, beta=beta, label_smoothing=label_smoothing, nll_alpha=nll_alpha)
        return LossValues(values.values, values.rewards, {"loss/dpo": values.values.detach(), **values.parts})
    weight = gamma * min(1.0, (batch.step + 1) / gamma_warmup_steps) if gamma_warmup_steps else gamma
    truth = beta * log_ratio(batch.truth_policy, batch.truth_reference).detach()
    ratio = log_ratio(batch.policy, batch.reference)
    reward = beta * ratio
    gap = truth - reward
    tied_or_above = gap <= beta * _TIE
    if generator == "hinge":
        term = gap.masked_fill(tied_or_above, 0.0)
    elif generator == "unhinged":
        term = gap
    else:
        expected = truth if baseline == "truth" else _mean_of_others(reward.detach(), batch.prompt)
        advantage = (reward.detach() - expected).clamp(-advantage_clip, advantage_clip)
        term = -advantage * batch.policy
    parts = {
        "loss/generator": term.detach(),
        "generator/active_fraction": (~tied_or_above).to(gap.dtype),
        "generator/reward_gap": gap.detach(),
        "generator/kl": ratio.detach(),
    }
    return LossValues(weight * term, None, parts)


def _mean_of_others(rewards: Tensor, prompt: Tensor) -> Tensor:
    """(samples,) the mean reward of the other samples of each one's prompt; its own where there is no other."""
    same = (prompt[:, None] == prompt).to(rewards.dtype)
    others = same.sum(1) - 1
    return torch.where(others > 0, (same @ rewards - rewards) / others.clamp(min=1), rewards)
