"""How fast a training is and what it takes of its device: read off clocks and counters, without waiting for it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpo_cli.data.example import Examples
from dpo_cli.forecast.cost import Batch, needed_flops
from dpo_cli.forecast.peaks import peak_tflops, utilisation_pct
from dpo_cli.forecast.plan import Plan

_GIB = 2**30
# As many as the average length of an example is known well enough from.
_TYPICAL_EXAMPLES = 512


@dataclass(frozen=True)
class Utilisation:
    """flops_per_token: what the model needs on average. device_tflops: the stated peak of each of `devices`."""

    flops_per_token: float
    device_tflops: float
    devices: int

    @classmethod
    def of(cls, plan: Plan | None, device: torch.device, batch: Batch) -> Utilisation | None:
        """None where it is not known: on a CPU, on a device without a stated peak, of a model that tells no sizes.

        batch: such as a step trains on.
        """
        if plan is None or device.type != "cuda":
            return None
        # The table is of half precision; who trains in float32 has another peak, and may state it.
        known = peak_tflops(torch.cuda.get_device_name(device)) if plan.layout.bytes_per_weight == 2 else None
        peak = plan.device_tflops or known
        if peak is None:
            return None
        needed = needed_flops(plan.shape, batch, adapters=plan.layout.lora is not None)
        return cls(needed / batch.tokens, peak, plan.layout.workers)

    def pct(self, tokens_per_second: float) -> float:
        return utilisation_pct(
            tokens_per_second=tokens_per_second,
            flops_per_token=self.flops_per_token,
            device_tflops=self.device_tflops,
            devices=self.devices,
        )


def typical_batch(examples: Examples, trained_responses: int | None) -> Batch:
    """Some examples from all over the data, each with the responses that are trained on (None: all)."""
    places = np.linspace(0, len(examples) - 1, num=min(len(examples), _TYPICAL_EXAMPLES), dtype=np.int64)
    chosen = (examples[int(place)] for place in places)
    return Batch.of((len(each.prompt), *map(len, each.responses[:trained_responses])) for each in chosen)


def memory_gib(device: torch.device) -> float | None:
    """The most that tensors have taken of this rank's GPU; on a CPU what the process takes now. None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return resident_pages * os.sysconf("SC_PAGE_SIZE") / _GIB


class Clock:
    """Throughput since it was made or last read; evaluation and saving are not counted."""

    def __init__(self, device: torch.device, utilisation: Utilisation | None) -> None:
        self._device, self._utilisation = device, utilisation
        self.begin()

    def begin(self) -> None:
        """Forget what was counted."""
        self._started = self._mark = time.perf_counter()
        self._tokens, self._waiting, self._sampling = 0, 0.0, 0.0

    def sampled(self) -> None:
        self._sampling += self._since_mark()

    def data_ready(self) -> None:
        self._waiting += self._since_mark()

    def _since_mark(self) -> float:
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    def step_done(self, tokens: int) -> None:
        self._mark = time.perf_counter()
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Metrics of the time since the last reading."""
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        tokens_per_second = self._tokens / elapsed
        metrics = {
            "perf/tokens_per_second": tokens_per_second,
            "perf/data_loading_pct": 100 * self._waiting / elapsed,
        }
        if self._sampling:
            metrics["perf/sampling_pct"] = 100 * self._sampling / elapsed
        if self._utilisation is not None:
            metrics["perf/mfu_pct"] = self._utilisation.pct(tokens_per_second)
        if (memory := memory_gib(self._device)) is not None:
            metrics["perf/memory_gib"] = memory
        self.begin()
        return metrics
