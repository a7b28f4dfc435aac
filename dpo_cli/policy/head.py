"""Log-probs of response tokens from hidden states, in chunks: no [tokens, vocabulary] tensor ever lives.

Installed as the `forward` of the model's own output head, so that hooks on the module (parameter gathering, adapters)
still run. Called without targets, the head does what it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo_cli.errors import ModelError
from dpo_cli.losses.types import Statistic, Statistics

# Large enough for the matrix product to run at full speed, small enough to be forgotten next to the activations.
CHUNK_BYTES = 64 * 2**20


class TokenScores(NamedTuple):
    """What the head says of each response token; all (R,), float32 (float64 for float64 models).

    logps: log-prob of the target in nats, differentiable.
    statistics: those that were asked for, detached.
    """

    logps: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: first a factor, then a soft cap at +-softcap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read from a model's config: Cohere multiplies, Granite divides, Gemma caps."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(scale=scale, softcap=float(softcap) if softcap else None)

    def __call__(self, logits: Tensor) -> Tensor:
        """In place: `logits` is a chunk of our own."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward(self, grad: Tensor, logits: Tensor) -> Tensor:
        """d loss / d (head output), in place, from d loss / d (transformed logits) and the transformed logits."""
        if self.softcap is not None:
            grad.mul_(1 - (logits / self.softcap).square())
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


def install_scoring_head(head: nn.Module, transform: LogitTransform, *, chunk_tokens: int | None = None) -> None:
    """Teach an output head `head(hidden, targets=ids, statistics=...) -> TokenScores`; `head(hidden)` stays as it was.

    chunk_tokens: response tokens per chunk; by default as many as make CHUNK_BYTES of float32 logits.
    """
    if type(head) is not nn.Linear:
        raise ModelError(
            f"The output head is a {type(head).__name__}; log-probs are computed from a plain linear head.",
            hint="leave the output head out of model.lora.target_modules",
        )
    plain_forward = head.forward
    chunk = chunk_tokens or max(16, CHUNK_BYTES // (4 * head.out_features))

    def forward(
        hidden: Tensor, targets: Tensor | None = None, statistics: frozenset[Statistic] = frozenset()
    ) -> Tensor | TokenScores:
        if targets is None:
            return plain_forward(hidden)
        names = sorted(statistics)
        logps, *found = _ChunkedLogps.apply(hidden, head.weight, head.bias, targets, transform, chunk, names)
        return TokenScores(logps, dict(zip(names, found, strict=True)))

    head.forward = forward  # type: ignore[method-assign, assignment]


# From a chunk's log-probs (tokens, vocabulary) and its targets (tokens,).
_STATISTICS: dict[Statistic, Callable[[Tensor, Tensor], Tensor]] = {
    # x * exp(x) with x = -inf would be NaN; a vocabulary entry that is masked out has probability zero.
    "entropy": lambda logps, _: -(logps.exp() * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1),
    "correct": lambda logps, targets: logps.argmax(-1) == targets,
    "sum_squared_probs": lambda logps, _: (2 * logps).exp().sum(-1),
}


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight^T + bias)[target], with the logits recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
        names: Sequence[Statistic],
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        tokens = len(targets)
        logps, log_norms, *found = (
            torch.empty(tokens, dtype=dtype, device=hidden.device) for _ in range(2 + len(names))
        )
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            wanted = targets[part, None]
            logits = transform(F.linear(hidden[part], weight, bias).to(dtype))
            log_norm = logits.logsumexp(-1, keepdim=True)
            log_norms[part] = log_norm[:, 0]
            logits.sub_(log_norm)
            logps[part] = logits.gather(-1, wanted)[:, 0]
            for name, statistic in zip(names, found, strict=True):
                statistic[part] = _STATISTICS[name](logits, targets[part])
        ctx.save_for_backward(hidden, weight, bias, targets, log_norms)
        ctx.transform, ctx.chunk = transform, chunk
        ctx.mark_non_differentiable(*found)
        return (logps, *found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_norms = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over chunks in float32: a bf16 running sum would lose what each chunk adds.
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if wants_bias and bias is not None else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = ctx.transform(F.linear(hidden[part], weight, bias).to(grad.dtype))
            probs = (logits - log_norms[part, None]).exp_()
            # d logp_target / d logits = onehot(target) - softmax
            slope = probs.neg_().scatter_add_(-1, targets[part, None], torch.ones_like(probs[:, :1]))
            slope = ctx.transform.backward(slope.mul_(grad[part, None]), logits)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad_weight.dtype == slope.dtype:
                    grad_weight.addmm_(slope.T, hidden[part])
                else:
                    grad_weight += slope.T @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
