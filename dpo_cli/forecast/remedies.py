"""What would make a run fit its devices, cheapest in speed first, each with its own forecast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dpo_cli.forecast.layout import Layout, LoraLayout, longest_pair
from dpo_cli.forecast.memory import Memory, forecast_memory
from dpo_cli.forecast.shape import ModelShape

# An allocator cannot hand out the last of a device: what is free lies in pieces.
USABLE_SHARE = 0.95
_MOST_WORKERS = 64
_LORA_RANK = 16


@dataclass(frozen=True)
class Change:
    """A layout and the words that ask for it on the command line."""

    layout: Layout
    words: tuple[str, ...] = ()

    def further(self, layout: Layout, *words: str) -> Change:
        keys = {word.partition("=")[0] for word in words}
        return Change(layout, (*(word for word in self.words if word.partition("=")[0] not in keys), *words))


@dataclass(frozen=True)
class Remedy:
    """A change that fits, with what it needs then."""

    name: str
    words: tuple[str, ...]
    layout: Layout
    memory: Memory


def fits(memory: Memory, device_bytes: float) -> bool:
    return memory.total <= USABLE_SHARE * device_bytes


def remedies(
    shape: ModelShape, layout: Layout, *, device_bytes: float, zero_groups: Sequence[str] = ()
) -> list[Remedy]:
    """One remedy of every kind that can help, alone if that is enough, else on top of cheap ones before it.

    zero_groups: choices of the `hardware` group that may be proposed, such as deepspeed_zero3.
    """
    found: list[Remedy] = []
    # What the cheap remedies so far can be combined to, fewest changes first.
    begins = [Change(layout)]
    for name, kind in _KINDS.items():
        changes = [change for begin in begins for change in kind(begin, zero_groups)]
        # A device more costs what no other change does: as few as will do, with whatever makes them do.
        for change in sorted(changes, key=lambda change: change.layout.workers):
            memory = forecast_memory(shape, change.layout)
            if fits(memory, device_bytes):
                found.append(Remedy(name, change.words, change.layout, memory))
                break
        if name in _CHEAP:
            begins = sorted([*begins, *changes], key=lambda change: len(change.words))
    return found


def _fewer_tokens(change: Change, zero_groups: Sequence[str]) -> Iterator[Change]:
    # A pair that is longer than a row goes through the model alone: below that nothing is gained.
    tokens, least = change.layout.tokens, longest_pair(change.layout.longest)
    while tokens > least:
        tokens = max(tokens // 2, least)
        yield change.further(replace(change.layout, tokens=tokens), f"tokens_per_microbatch={tokens}")


def _checkpointing(change: Change, zero_groups: Sequence[str]) -> Iterator[Change]:
    if not change.layout.gradient_checkpointing:
        yield change.further(replace(change.layout, gradient_checkpointing=True), "model.gradient_checkpointing=true")


def _higher_stage(change: Change, zero_groups: Sequence[str]) -> Iterator[Change]:
    layout = change.layout
    for stage in (1, 2, 3):
        group = f"deepspeed_zero{stage}"
        if layout.workers > 1 and stage > (layout.zero_stage or 0) and group in zero_groups:
            yield change.further(
                replace(layout, zero_stage=stage), f"hardware={group}", f"hardware.num_workers={layout.workers}"
            )


def _more_workers(change: Change, zero_groups: Sequence[str]) -> Iterator[Change]:
    stage = 3 if "deepspeed_zero3" in zero_groups else change.layout.zero_stage
    if not stage:
        return
    workers = change.layout.workers * 2
    while workers <= _MOST_WORKERS:
        words = [f"hardware.num_workers={workers}"]
        if stage != change.layout.zero_stage:
            words.insert(0, f"hardware=deepspeed_zero{stage}")
        yield change.further(replace(change.layout, zero_stage=stage, workers=workers), *words)
        workers *= 2


def _offload(change: Change, zero_groups: Sequence[str]) -> Iterator[Change]:
    layout = change.layout
    words = []
    if not layout.zero_stage or layout.zero_stage < 3:
        if "deepspeed_zero3" not in zero_groups:
            return
        layout = replace(layout, zero_stage=3)
        words = ["hardware=deepspeed_zero3", f"hardware.num_workers={layout.workers}"]
    if layout.offload_optimizer == "none":
        layout = replace(layout, offload_optimizer="cpu")
        words.append("hardware.offload_optimizer=cpu")
        yield change.further(layout, *words)
    if layout.offload_parameters == "none":
        layout = replace(layout, offload_parameters="cpu")
        words.append("hardware.offload_parameters=cpu")
        yield change.further(layout, *words)


def _adapters(change: Change, zero_groups: Sequence[str]) -> Iterator[Change]:
    if change.layout.lora is None:
        adapted = replace(change.layout, lora=LoraLayout(_LORA_RANK))
        if adapted.sampling is not None:
            # The policy without its adapters is the reference then.
            adapted = replace(adapted, sampling=replace(adapted.sampling, frozen_reference=False))
        yield change.further(adapted, f"model.lora.rank={_LORA_RANK}")


_KINDS = {
    "fewer tokens at once": _fewer_tokens,
    "gradient checkpointing": _checkpointing,
    "a higher ZeRO stage": _higher_stage,
    "more workers": _more_workers,
    "offload to the host": _offload,
    "low-rank adapters": _adapters,
}
# What takes nothing but a little time: no further machine, no trained weights less.
_CHEAP = ("fewer tokens at once", "gradient checkpointing", "a higher ZeRO stage")
