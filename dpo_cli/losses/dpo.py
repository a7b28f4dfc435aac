"""Direct preference optimisation, with the variations that keep its shape."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_cli.errors import LossInputError
from dpo_cli.losses.f_divergence import f_score
from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.types import LossValues, PairLogps, declare


@declare()
def dpo_loss(
    pair: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    nll_alpha: float = 0.0,
    average_logps: bool = False,
    reference_free: bool = False,
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl",
    f_alpha: float = 0.5,
    use_weighting: bool = False,
    ld_alpha: float = 1.0,
) -> LossValues:
    """Raise the implicit reward of the chosen response above that of the rejected one.

        reward(y) = beta * log(policy(y|x) / reference(y|x))
        margin    = reward(chosen) - reward(rejected)
        value     = -(1 - label_smoothing) * log sigmoid(margin) - label_smoothing * log sigmoid(-margin)
                    + nll_alpha * -log policy(chosen|x) / chosen_tokens

    pair: summed logps in nats, each (pairs,). beta > 0, in 1/nats.
    label_smoothing: in [0, 0.5], the assumed share of labels that are the wrong way round (conservative DPO): the
        margin is drawn to log((1 - e) / e) instead of infinity.
    nll_alpha: >= 0, weight of imitating the chosen response. Each response's NLL is divided by its own length, so
        every pair counts alike and the normaliser stays pairs.
    average_logps: rewards are beta times the mean log-ratio per token, so beta wants to be larger, by about the
        length of a response where the same margin is meant.
    reference_free: reference terms are zero and need not be given; the pull is then towards a uniform policy.
    f_divergence, f_alpha: what holds the policy to the reference. Any but reverse_kl replaces the log-ratio in the
        reward by f_divergence.f_score of it, and needs a reference. f_alpha: in [0, 1], of alpha_divergence alone.
    use_weighting: multiply the preference term by how likely the policy is to write the two responses itself (WPO),
        w(chosen) * w(rejected), with w(y) = exp(mean over its tokens of log(p(token) / sum of p**2 at its place)). No
        gradient flows through it. Reads the statistic log_sum_squared_probs.
    ld_alpha: in [0, 1], what tokens beyond the length of the pair's shorter response weigh (LD-DPO). It has entered the
        sums and the token counts before they come here, of policy and reference alike, and is not applied again.
    Returns values (pairs,), unreduced, with detached rewards; where nll_alpha is not 0, parts loss/dpo and loss/nll
    (before its weight); with use_weighting, part weights. Starts at log 2 when the policy is the reference, with
    use_weighting at log 2 times the mean weight.
    Raises LossInputError when reference logps are absent and reference_free is not set, or when it is set beside an
        f_divergence other than reverse_kl.
    Source: DPO eq. 7, arXiv:2305.18290; smoothing, Mitchell 2023, "A note on DPO with noisy preferences";
        NLL term, Iterative RPO eq. 1, arXiv:2404.19733; averages, as the code of RLAIF-V offers them, arXiv:2405.17220;
        divergences, f-DPO, arXiv:2309.16240; weights, WPO eq. 2, arXiv:2406.11827; length, LD-DPO,
        arXiv:2409.06411.
    """
    if not reference_free:
        chosen, rejected = (f_score(ratio, f_divergence, alpha=f_alpha) for ratio in pair_log_ratios(pair))
    elif f_divergence == "reverse_kl":
        chosen, rejected = pair.policy_chosen, pair.policy_rejected
    else:
        raise LossInputError(
            f"f_divergence={f_divergence} compares with a reference, and reference_free leaves it out.",
            hint="loss.f_divergence=reverse_kl, or loss.reference_free=false",
        )
    if average_logps:
        chosen, rejected = chosen / pair.chosen_tokens, rejected / pair.rejected_tokens
    margin = beta * (chosen - rejected)
    values = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    rewards = ((beta * chosen).detach(), (beta * rejected).detach())
    parts: dict[str, Tensor] = {}
    if use_weighting:
        parts["weights"] = _on_policy_weights(pair)
        values = parts["weights"] * values
    if nll_alpha == 0:
        return LossValues(values, rewards, parts)
    nll = -pair.policy_chosen / pair.chosen_tokens
    parts |= {"loss/dpo": values.detach(), "loss/nll": nll.detach()}
    return LossValues(values + nll_alpha * nll, rewards, parts)


def _on_policy_weights(pair: PairLogps) -> Tensor:
    """(pairs,) WPO's weights, detached."""
    policy = torch.stack([pair.policy_chosen, pair.policy_rejected], dim=1).detach()
    tokens = torch.stack([pair.chosen_tokens, pair.rejected_tokens], dim=1)
    return ((policy - pair.statistics["log_sum_squared_probs"]) / tokens).sum(dim=1).exp()
