"""How packed rows are attended to: which kernels there are, and which of them a run uses.

A kernel is taken at its word only as far as a probe goes: forward and backward on a small row, with the model's heads,
beside the plain route. What is missing, too old or wrong on this GPU is passed over, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_cli.batch.layout import PackedRow, Segment
from dpo_cli.errors import ModelError
from dpo_cli.policy.attention import RowAttention, RowPlan, plan_attention, plan_scored_attention
from dpo_cli.policy.flex_attention import plan_flex
from dpo_cli.policy.varlen_attention import flash_attn_call, plan_varlen, torch_varlen_call

PlanRow = Callable[[Sequence[Segment], torch.device], RowAttention]


@dataclass(frozen=True)
class AttentionRoute:
    """name: what the reference store records; log-probs of different routes differ in their last bits.

    plan: how a row of given segments is attended to. plan_scored: how the scored rows alone are; None: with all others.
    told: for the screen; None where there was nothing to choose.
    """

    name: str
    plan: PlanRow
    plan_scored: Callable[[PackedRow, torch.device], RowAttention] | None = None
    told: str | None = None

    def plan_row(self, row: PackedRow, device: torch.device) -> RowPlan:
        """For all layers of a model. The row is on the device."""
        attention = self.plan(row.segments, device)
        # A GPU has kernels without a mask for whole sequences, and needs one for their last queries.
        plan_scored = self.plan_scored if device.type == "cpu" else None
        return RowPlan(attention, row.scored, attention if plan_scored is None else plan_scored(row, device))


PLAIN = AttentionRoute("packed-sdpa", plan_attention, plan_scored_attention)
_PLAIN_WORDS = "scaled_dot_product_attention, segment by segment"


@dataclass(frozen=True)
class Heads:
    """The shape of a model's attention. width, value_width: of a head. windowed: some layers have a sliding window."""

    queries: int
    keys: int
    width: int
    value_width: int
    windowed: bool

    @classmethod
    def of(cls, config: Any) -> Heads:
        """Read from a model's config."""
        queries = int(config.num_attention_heads)
        width = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
        width = int(width or config.hidden_size // queries)
        return cls(
            queries=queries,
            keys=int(getattr(config, "num_key_value_heads", None) or queries),
            width=width,
            value_width=int(getattr(config, "v_head_dim", None) or width),
            windowed=bool(getattr(config, "sliding_window", None)),
        )


def _flash() -> PlanRow:
    return partial(plan_varlen, call=flash_attn_call())


def _varlen() -> PlanRow:
    return partial(plan_varlen, call=torch_varlen_call())


def _flex() -> PlanRow:
    return plan_flex


# In order of preference. Each gives a plan, or raises ImportError.
_KERNELS: dict[str, tuple[str, Callable[[], PlanRow]]] = {
    "flash": ("flash-attn", _flash),
    "varlen": ("torch's varlen attention", _varlen),
    "flex": ("FlexAttention", _flex),
}


def choose_attention(name: str, config: Any, *, device: torch.device, dtype: torch.dtype) -> AttentionRoute:
    """The route that `model.attention` names; "auto" takes the first kernel of the list that this machine can use.

    config: the model's, for the shape of its heads. On a CPU, and for float32, "auto" is the plain route.
    Raises ModelError where a kernel was asked for and cannot be used.
    """
    if name == "sdpa" or (name == "auto" and device.type != "cuda"):
        return PLAIN
    passed_over = []
    for kernel in _KERNELS if name == "auto" else (name,):
        words, find = _KERNELS[kernel]
        try:
            plan = find()
            _check_possible(kernel, device, dtype)
            _probe(plan, Heads.of(config), device, dtype)
        except Exception as error:  # a kernel that was built for another torch or GPU fails in a way of its own
            passed_over.append(f"not {words}: {_first_line(error)}")
            continue
        why = f" ({'; '.join(passed_over)})" if passed_over else ""
        return AttentionRoute(f"packed-{kernel}", plan, told=f"{words}, one call a layer{why}")
    if name == "auto":
        return replace(PLAIN, told=f"{_PLAIN_WORDS} ({'; '.join(passed_over)})")
    raise ModelError(
        f"{_KERNELS[name][0]} cannot be used here: {passed_over[0].partition(': ')[2]}",
        where=f"model.attention={name}",
        hint="model.attention=auto takes what there is",
    )


def _check_possible(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Reasons in plain words, for what a kernel would say in its own."""
    if device.type != "cuda":
        raise ValueError("it needs a GPU")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"it has no {str(dtype).removeprefix('torch.')}, or not to all digits")
    if kernel != "flex" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError("it needs an Ampere GPU (such as an A100) or a newer one")


# Two prompts: one with three responses, so that keys are shared, one with two. Lengths on both sides of a block.
_PROBED = (
    Segment(0, 150, 0, 0),
    Segment(150, 187, 0, 133),
    Segment(187, 190, 0, 133),
    Segment(190, 231, 190, 190),
    Segment(231, 261, 190, 195),
)
_PROBED_WINDOW = 17
# Of the norm of outputs and gradients. bfloat16 is off by 0.005; a mask that is wrong in one row, by more than this.
_PROBE_TOLERANCE = 0.02


def _probe(plan_row: PlanRow, heads: Heads, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where outputs or gradients are not those of the plain route in float32."""
    tokens = _PROBED[-1].query_end
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads.queries, heads.width), (heads.keys, heads.width), (heads.keys, heads.value_width))
    drawn = [torch.randn(tokens, *shape, generator=generator).to(device, dtype) for shape in shapes]
    slope = torch.randn(tokens, heads.queries, heads.value_width, generator=generator).to(device, dtype)
    plan, plain = plan_row(_PROBED, device), plan_attention(_PROBED, device)
    for window in (None, _PROBED_WINDOW) if heads.windowed else (None,):
        found = _attended(plan, drawn, slope, window)
        wanted = _attended(plain, [states.float() for states in drawn], slope.float(), window)
        for what, a, b in zip(("outputs", "query", "key", "value gradients"), found, wanted, strict=True):
            difference = float((a.float() - b).norm() / b.norm())
            # `not <=`, so that NaN fails.
            if not difference <= _PROBE_TOLERANCE:
                raise ValueError(f"its {what} differ by {difference:.2g} from the plain route's")


def _attended(plan: RowAttention, drawn: Sequence[Tensor], slope: Tensor, window: int | None) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    q, k, v = (states.detach().requires_grad_() for states in drawn)
    with torch.enable_grad():
        out = plan.attend(q, k, v, scaling=None, window=window)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), slope)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
