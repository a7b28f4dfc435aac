"""How fast devices are said to be, and what share of that a training makes use of."""

from __future__ import annotations

import re

# What its maker states for dense bfloat16 products, in 1e12 operations a second, by words of the device's name; of
# two entries that fit the first counts.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0,
    "H800": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A10G": 70.0, "A10": 125.0,
    "A40": 150.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """None for a device that is not in the table."""
    return next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", device_name)), None)


def utilisation_pct(*, tokens_per_second: float, flops_per_token: float, device_tflops: float, devices: int) -> float:
    """Model FLOPs utilisation in percent: of all devices' peak, the share that operations the model needs make up.

    tokens_per_second: of all devices together. flops_per_token: forward and backward, nothing computed again.
    Source: PaLM, arXiv:2204.02311, appendix B.
    """
    return 100 * tokens_per_second * flops_per_token / (device_tflops * 1e12 * devices)
