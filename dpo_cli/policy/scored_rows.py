"""The last layer for the rows that predict a response token, and no others.

Every row's keys and values are needed up to the last layer; its queries, and what comes after its attention, are looked
at only where a response token is predicted. On long prompts with short responses that spares most of that layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_KNOWS = "_spares_unscored_rows"
# Of an attention, what has one output a row that only this row's own result depends on.
_PROJECTIONS = ("q_proj", "o_proj")


def spare_unscored_rows(decoder: nn.Module) -> None:
    """Have a decoder's last layer pass only `segments.scored` rows through its `mlp`, and through its attention as
    queries; the others get zeros from each.

    Calls without a plan are answered as before. Decoders that call these parts by other names are left as they are, and
    so are those that know already.
    """
    attention, mlp = (getattr(last_layer(decoder), name, None) for name in ("self_attn", "mlp"))
    if isinstance(attention, nn.Module) and isinstance(mlp, nn.Module) and not hasattr(mlp, _KNOWS):
        rows = _ScoredRows()
        setattr(mlp, _KNOWS, True)
        attention.register_forward_pre_hook(rows.learn, with_kwargs=True)
        projections = (getattr(attention, name, None) for name in _PROJECTIONS)
        for part in (mlp, *(projection for projection in projections if isinstance(projection, nn.Module))):
            part.register_forward_pre_hook(rows.select)
            part.register_forward_hook(rows.restore)
        mlp.register_forward_hook(rows.forget)


def last_layer(decoder: nn.Module) -> nn.Module | None:
    """None where a decoder calls its layers by another name."""
    layers = getattr(decoder, "layers", None)
    return layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None


class _ScoredRows:
    """Hooks of one layer. Its attention is told the plan, also when gradient checkpointing computes it again."""

    def __init__(self) -> None:
        self._scored: Tensor | None = None
        self._rows = 0

    def learn(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        plan = kwargs.get("segments")
        self._scored = None if plan is None else plan.scored
        if plan is None:
            return None
        return args, kwargs | {"segments": replace(plan, attention=plan.scored_attention)}

    def select(self, part: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """(1, T, d) -> (1, S, d)."""
        if self._scored is None:
            return None
        self._rows = args[0].shape[1]
        return (args[0].index_select(1, self._scored),)

    def restore(self, part: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """(1, S, d) -> (1, T, d)."""
        if self._scored is None:
            return None
        restored: Tensor = _Restored.apply(output, self._scored, self._rows)
        return restored

    def forget(self, mlp: nn.Module, args: Any, output: Tensor) -> None:
        """The layer ends with it; who calls its parts by themselves has no plan."""
        self._scored = None


class _Restored(torch.autograd.Function):
    """index_copy into zeros, which would keep what it copies for a backward pass that only asks for its shape."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, scored: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(scored)
        return output.new_zeros(output.shape[0], rows, output.shape[2]).index_copy_(1, scored, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scored,) = ctx.saved_tensors
        return grad.index_select(1, scored), None, None
