"""A plan as text: a table for `plan=true`, a line for a run that starts."""

from __future__ import annotations

from collections.abc import Iterator

from dpo_cli.forecast.cost import ASSUMED_UTILISATION
from dpo_cli.forecast.layout import Layout, longest_pair
from dpo_cli.forecast.memory import CACHE, CONTEXT, GIB, LINES, REFERENCE, trained_parameters
from dpo_cli.forecast.plan import Plan
from dpo_cli.forecast.remedies import USABLE_SHARE

_WIDTH = 28


def plan_text(plan: Plan) -> str:
    return "\n".join(
        [*_heading(plan), "", *_table(plan), "", *_beside(plan), "", *_verdict(plan), "", *_assumptions(plan)]
    )


def summary(plan: Plan) -> str:
    """The same forecast in one line."""
    device = plan.machine.device_bytes
    line = f"forecast: {_gib(plan.memory.total)} at the peak"
    if device is not None:
        line += f" of {_gib(device)} on the {_device(plan)}"
    line += f"; {_readable(plan.disk.checkpoint)} a checkpoint, {_readable(plan.disk.final)} for final/"
    if plan.fits is False:
        line += "; that may not fit: plan=true tells what would"
    return line


def _heading(plan: Plan) -> Iterator[str]:
    layout, shape = plan.layout, plan.shape
    dtype = "half precision" if layout.half else "float32"
    yield f"model: {plan.model}, {shape.parameters:,} parameters by {plan.counted_from}, computed in {dtype}"
    if layout.lora is not None:
        yield f"in training: {trained_parameters(shape, layout):,} parameters of adapters of rank {layout.lora.rank}"
    yield f"layout: {_layout(layout, plan)}"
    checkpointing = "with" if layout.gradient_checkpointing else "without"
    tokens = max(layout.tokens, longest_pair(layout.longest))
    alone = " (the longest pair, alone)" if tokens > layout.tokens else ""
    yield f"row: {tokens:,} tokens at once{alone}, {checkpointing} gradient checkpointing; {layout.optimizer}"


def _layout(layout: Layout, plan: Plan) -> str:
    if layout.zero_stage is None:
        return f"one {_device(plan)}"
    workers = f"{layout.workers} workers" if layout.workers > 1 else "1 worker"
    moved = [
        f"{what} on {place}"
        for what, place in (("optimiser", layout.offload_optimizer), ("parameters", layout.offload_parameters))
        if place != "none"
    ]
    return ", ".join([f"ZeRO stage {layout.zero_stage}" if layout.zero_stage else "whole copies", workers, *moved])


def _device(plan: Plan) -> str:
    return "GPU" if plan.machine.on_gpu else "CPU"


def _table(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield f"{'memory per device':<{_WIDTH}}{'at the peak':>14}{'at most':>14}"
    for line in LINES:
        if memory.at_most(line) or line not in (CONTEXT, REFERENCE, CACHE):
            yield f"  {line:<{_WIDTH - 2}}{_gib(memory.at_peak(line)):>14}{_gib(memory.at_most(line)):>14}"
    yield f"  {'total':<{_WIDTH - 2}}{_gib(memory.total):>14}"
    yield f"The peak is {memory.peak.name}."


def _beside(plan: Plan) -> Iterator[str]:
    memory, disk, step = plan.memory, plan.disk, plan.step
    if memory.host:
        yield f"main memory, all workers: {_gib(memory.host)}"
    if memory.nvme:
        yield f"fast disk, all workers: {_gib(memory.nvme)}"
    yield (
        f"disk: {_readable(disk.checkpoint)} a checkpoint, {_readable(disk.most)} with all that are kept while another "
        f"is written, {_readable(disk.final)} for final/"
    )
    yield f"step: {step.tokens:,} tokens at most, {step.flops / 1e12:,.4g} TFLOP"
    if plan.device_tflops is None:
        yield "time: unknown without the device's peak (hardware.device_tflops=...)"
    else:
        seconds = step.seconds(device_tflops=plan.device_tflops, workers=plan.layout.workers)
        yield (
            f"time: {seconds:,.3g} s a step at most, if {ASSUMED_UTILISATION:.0%} of {plan.device_tflops:g} TFLOPS "
            "are reached"
        )
    yield from _exchange(plan)


def _exchange(plan: Plan) -> Iterator[str]:
    traffic, workers, passes = plan.traffic, plan.layout.workers, plan.step.micro_batches
    if workers == 1:
        return
    line = f"exchange: {_readable(traffic.gathered)} gathered and {_readable(traffic.reduced)} summed a step "
    line += f"of {passes:,} micro-batch{'es' if passes > 1 else ''}"
    if plan.device_tflops is not None:
        seconds = plan.step.seconds(device_tflops=plan.device_tflops, workers=workers)
        line += f"; it takes as long as computing at {_readable(traffic.sent(workers) / seconds)}/s a worker"
    yield line


def _verdict(plan: Plan) -> Iterator[str]:
    device = plan.machine.device_bytes
    if device is None:
        yield "Whether it fits is unknown without the device's memory (hardware.device_memory_gb=...)."
        return
    if plan.fits:
        yield f"It fits: {_gib(device - plan.memory.total)} of {_gib(device)} are left."
        return
    yield f"It does not fit: {_gib(device)} are there, of which {USABLE_SHARE:.0%} can be used."
    if not plan.remedies:
        yield "Nothing that could be changed here makes it fit."
        return
    yield "What would, cheapest in speed first:"
    for remedy in plan.remedies:
        host = f" and {_gib(remedy.memory.host)} of main memory" if remedy.memory.host else ""
        yield f"  {remedy.name}: {_gib(remedy.memory.total)}{host}"
        yield f"      {' '.join(remedy.words)}"


def _assumptions(plan: Plan) -> Iterator[str]:
    half = plan.layout.longest // 2
    yield (
        f"Assumed: full rows of pairs with {half:,} tokens in the prompt and in each response (data.max_tokens="
        f"{plan.layout.longest:,}),"
    )
    held = plan.layout.sampling is not None and plan.layout.sampling.frozen_reference
    yield f"every token scored, and a reference that is {'' if held else 'not '}held in memory during training."
    if plan.layout.sampling is not None:
        sampling = plan.layout.sampling
        yield f"Samples of {sampling.longest - half:,} tokens, {sampling.tokens:,} tokens at once with their prompts."
    yield "Measured: docs/memory.md."


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size == 0 or size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
