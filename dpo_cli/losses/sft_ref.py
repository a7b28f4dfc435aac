"""Supervised fine-tuning: how a reference policy is made before DPO."""

from __future__ import annotations

from dpo_cli.losses.types import DemonstrationLogps, LossValues, declare


@declare(normaliser="tokens", needs_reference=False)
def sft_ref_loss(demo: DemonstrationLogps) -> LossValues:
    """Imitate the response: its negative log-likelihood.

        value = -log policy(y|x)

    Divided by the response tokens of the global batch (the declared normaliser), which makes every token count alike
    and the loss the usual mean cross-entropy, in nats per token. Prompt tokens are never scored.

    demo: summed logps in nats, each (examples,).
    Returns values (examples,), unreduced. Has no fixed start value; an untrained model starts near log(vocabulary).
    Source: DPO section 4, arXiv:2305.18290: the reference maximises the likelihood of the chosen responses.
    """
    return LossValues(-demo.policy)
