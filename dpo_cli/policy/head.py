"""Log-probs of response tokens from hidden states, in chunks: no [tokens, vocabulary] tensor ever lives.

Installed as the `forward` of the model's own output head, so that hooks on the module (parameter gathering, adapters)
still run. Called without targets, the head does what it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpo_cli.errors import ModelError
from dpo_cli.losses.types import Statistic, Statistics
from dpo_cli.policy.products import linear, matmul, multiply_into, widens

# Large enough for the matrix product to run at full speed, small enough to be forgotten next to the activations. So
# much of a softmax is also kept for the backward pass instead of being computed again.
CHUNK_BYTES = 64 * 2**20
# A larger chunk of a small vocabulary gains nothing more, and on a CPU falls out of the cache between its passes.
CHUNK_TOKENS = 512
# Columns that are searched for a largest logit at a time.
_BLOCK = 128


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

    chunk_tokens: response tokens per chunk; by default as many as make CHUNK_BYTES of float32 logits, at most
        CHUNK_TOKENS.
    """
    if type(head) is not nn.Linear:
        raise ModelError(
            f"The output head is a {type(head).__name__}; log-probs are computed from a plain linear head.",
            hint="leave the output head out of model.lora.target_modules",
        )
    plain_forward = head.forward
    chunk = chunk_tokens or min(CHUNK_TOKENS, max(16, CHUNK_BYTES // (4 * head.out_features)))

    def forward(
        hidden: Tensor, targets: Tensor | None = None, statistics: frozenset[Statistic] = frozenset()
    ) -> Tensor | TokenScores:
        if targets is None:
            return plain_forward(hidden)
        names = sorted(statistics)
        # The soft cap's slope needs logits, of which nothing is left; without a backward pass nothing is needed.
        keeps = torch.is_grad_enabled() and transform.softcap is None
        kept = max(1, CHUNK_BYTES // (4 * head.out_features * chunk)) if keeps else 0
        logps, *found = _ChunkedLogps.apply(hidden, head.weight, head.bias, targets, transform, chunk, kept, names)
        return TokenScores(logps, dict(zip(names, found, strict=True)))

    head.forward = forward  # type: ignore[method-assign, assignment]


class _Chunk(NamedTuple):
    """One chunk's softmax, unnormalised: what statistics are computed from.

    shifted: logits minus their row's largest, (tokens, vocabulary); exps: exp(shifted); norm: sums of exps, (tokens,).
    best: the entry with the largest logit, (tokens,); targets: (tokens,).
    """

    shifted: Tensor
    exps: Tensor
    norm: Tensor
    best: Tensor
    targets: Tensor


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the vocabulary of left * right without keeping the products."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit and the first place it stands at, as `logits.max(-1)`: both (tokens,).

    Places are looked for in one block of columns a row: with them `max` is five to ten times as slow as `amax`.
    """
    columns = logits.shape[1]
    blocks = columns // _BLOCK
    whole = blocks * _BLOCK
    peaks = logits[:, :whole].unflatten(1, (blocks, _BLOCK)).amax(-1)
    if whole < columns:
        peaks = torch.cat((peaks, logits[:, whole:].amax(-1, keepdim=True)), dim=1)
    start = peaks.argmax(-1, keepdim=True) * _BLOCK
    places = start + torch.arange(_BLOCK, device=logits.device)
    largest, place = logits.gather(1, places.clamp_(max=columns - 1)).max(-1, keepdim=True)
    return largest[:, 0], (start + place)[:, 0]


def _entropy(chunk: _Chunk) -> Tensor:
    # A vocabulary entry that is masked out has probability zero, and 0 * -inf would be NaN.
    shifted = chunk.shifted.clamp_(min=torch.finfo(chunk.shifted.dtype).min)
    return chunk.norm.log() - _row_dots(chunk.exps, shifted) / chunk.norm


_STATISTICS: dict[Statistic, Callable[[_Chunk], Tensor]] = {
    "entropy": _entropy,
    "correct": lambda chunk: chunk.best == chunk.targets,
    "log_sum_squared_probs": lambda chunk: _row_dots(chunk.exps, chunk.exps).log() - 2 * chunk.norm.log(),
}


class _Buffers:
    """The chunk-sized tensors of one pass, allocated once: on a CPU a fresh one costs as much as a matrix product."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = (rows, columns), dtype, device
        self._held: dict[str | int, Tensor] = {}

    def take(self, name: str | int, rows: int) -> Tensor:
        if name not in self._held:
            self._held[name] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        return self._held[name][:rows]

    def drop(self, name: str) -> None:
        self._held.pop(name, None)

    def logits(
        self, name: str | int, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform
    ) -> Tensor:
        """Transformed logits of a chunk's hidden states (tokens, hidden), ours to change in place."""
        logits = self.take(name, len(hidden))
        if hidden.dtype == logits.dtype and weight.dtype == logits.dtype:
            multiply_into(logits, hidden, weight)
            if bias is not None:
                logits.add_(bias)
        else:
            logits.copy_(linear(hidden, weight, bias))
        return transform(logits)


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight^T + bias)[target].

    The backward pass needs every chunk's softmax again. Those of the last `kept` chunks are still where the forward
    pass left them; the others are computed once more, in the place of one that is done with.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
        kept: int,
        names: Sequence[Statistic],
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        tokens = len(targets)
        logps, log_norms, *found = (
            torch.empty(tokens, dtype=dtype, device=hidden.device) for _ in range(2 + len(names))
        )
        norms = torch.empty_like(logps)
        buffers, places = _Buffers(min(chunk, tokens), len(weight), dtype, hidden.device), max(1, kept)
        for number, part in enumerate(_chunks(tokens, chunk)):
            logits = buffers.logits("logits", hidden[part], weight, bias, transform)
            largest, best = _largest(logits)
            shifted = logits.sub_(largest[:, None])
            exps = torch.exp(shifted, out=buffers.take(number % places, len(shifted)))
            norm = exps.sum(-1)
            log_norm = norm.log()
            norms[part], log_norms[part] = norm, largest + log_norm
            logps[part] = shifted.gather(-1, targets[part, None])[:, 0] - log_norm
            for name, statistic in zip(names, found, strict=True):
                statistic[part] = _STATISTICS[name](_Chunk(shifted, exps, norm, best, targets[part]))
        ctx.save_for_backward(hidden, weight, bias, targets, log_norms, norms)
        buffers.drop("logits")
        ctx.transform, ctx.chunk, ctx.places, ctx.kept = transform, chunk, places, buffers if kept else None
        ctx.mark_non_differentiable(*found)
        return (logps, *found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_norms, norms = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over chunks in float32: a bf16 running sum would lose what each chunk adds.
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=grad.dtype) if wants_bias and bias is not None else None
        chunks = _chunks(len(targets), ctx.chunk)
        # What is kept serves one backward pass, which overwrites it; another one finds nothing and computes all.
        kept, ctx.kept = ctx.kept, None
        first_kept = len(chunks) if kept is None else len(chunks) - ctx.places
        buffers = kept or _Buffers(min(ctx.chunk, len(targets)), len(weight), grad.dtype, hidden.device)
        for number, part in reversed(list(enumerate(chunks))):
            if number >= first_kept:
                logits = slope = buffers.take(number % ctx.places, part.stop - part.start)
                slope.mul_((-grad[part] / norms[part])[:, None])
            else:
                logits = buffers.logits(0, hidden[part], weight, bias, ctx.transform)
                # The soft cap's slope needs the logits once more; without it their memory becomes the slope's.
                out = logits if ctx.transform.softcap is None else buffers.take("slope", len(logits))
                slope = torch.sub(logits, log_norms[part, None], out=out).exp_().mul_(-grad[part, None])
            # d logp_target / d logits = onehot(target) - softmax
            slope.scatter_add_(-1, targets[part, None], grad[part, None])
            slope = ctx.transform.backward(slope, logits)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            if grad_hidden is not None and widens(weight):
                grad_hidden[part] = matmul(slope, weight)
            elif grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad_weight.dtype == slope.dtype:
                    grad_weight.addmm_(slope.T, hidden[part])
                else:
                    grad_weight += matmul(slope.T, hidden[part])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )
