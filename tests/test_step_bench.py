"""The step benchmark runs, and both trainers do the same work in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "step.py"
# TRL sums float32 log-probs in float32.
ROUNDING = 2e-5
BFLOAT16_ROUNDING = 1e-2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_all_sides_have_the_same_losses_and_a_ratio_is_told(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is a development dependency: pip install trl")
    told = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--json", str(told)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    cases = json.loads(told.read_text(encoding="utf-8"))["cases"]
    for name, rounding in (("quick", ROUNDING), ("quick, adapters", BFLOAT16_ROUNDING)):
        runs = cases[name]["runs"]
        (ours,) = runs.pop("ours")
        assert len(ours["losses"]) == 4
        assert len(set(ours["losses"])) == 4, "losses that never change would prove little"
        assert set(runs) == {"trl", "fair", "grouped"}
        for side, (run,) in runs.items():
            # The timed steps of the length-grouped side have other pairs.
            compared = 1 if side == "grouped" else 4
            assert run["losses"][:compared] == pytest.approx(ours["losses"][:compared], rel=rounding)
    fair = [line for line in done.stdout.splitlines() if "TRL, fair |" in line and "**" in line]
    assert len(fair) == len(cases)
    for line in fair:
        ratios = [float(cell.strip(" *")) for cell in line.split("|") if "**" in cell]
        assert len(ratios) == 3 and min(ratios) > 0


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("lora_rank", [None, 1])
def test_the_products_that_a_step_needs_are_those_it_makes(lora_rank: int | None) -> None:
    """Counted by torch while a pair goes through; it does not see attention on a CPU, nor products that are added."""
    from step_cases import QUICK, Pair
    from step_flops import attention_flops, needed_flops, product_flops
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, Qwen2Config

    from dpo_cli.batch.layout import pack
    from dpo_cli.data.example import Example
    from dpo_cli.policy.packed_model import PackedModel

    case = replace(QUICK, hidden=64, intermediate=256, tied=False, lora_rank=lora_rank)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**case.model_config), attn_implementation="packed")
    if lora_rank:
        # As where adapters are trained, but for the adapters: gradients pass through frozen weights.
        model.requires_grad_(False)
        model.get_input_embeddings().requires_grad_(True)
    parts = [list(range(1, length)) for length in (40, 30, 20)]
    prompt, *responses = (np.array(part, dtype=np.int32) for part in parts)
    with FlopCounterMode(display=False) as counter:
        PackedModel(model)(pack([Example(prompt, tuple(responses))])).logps.sum().backward()
    pair = Pair(*parts, 0.0, 0.0)
    unseen = 0 if lora_rank else 2 * case.hidden * case.vocabulary * sum(map(len, responses))
    assert counter.get_total_flops() + unseen == product_flops(case, pair)
    assert needed_flops(case, [pair, pair]) == 2 * (product_flops(case, pair) + attention_flops(case, pair))


@pytest.mark.usefixtures("scripts")
def test_the_gpu_s_table_tells_utilisation_where_the_peak_is_known_and_failures_by_name() -> None:
    from step import figures, gpu_table
    from step_cases import pairs_of
    from step_gpu import GPU_CASES

    from dpo_cli.forecast.peaks import peak_tflops

    assert [peak_tflops(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L40S", "Some GPU")] == [
        989, 756, 362, None,
    ]  # fmt: skip
    case = next(iter(GPU_CASES.values()))
    run = {"losses": [0.7] * case.steps, "peak_bytes": 2**30, "attention": "torch's varlen attention"}
    runs = {
        "ours": [run | {clock: [0.5] * case.steps for clock in ("seconds", "cpu_seconds")}],
        "trl": [run | {clock: [1.0] * case.steps for clock in ("seconds", "cpu_seconds")}],
        "half": [{"failed": "out of memory: tried to allocate 20 GiB"}],
    }
    results = {"a case": {"runs": runs, "figures": figures(case, pairs_of(case, None), runs)}}
    for peak, shown in ((312.0, "%"), (None, "unknown")):
        *_, ours, trl, half = gpu_table(results, peak).splitlines()
        assert shown in ours.split("|")[7]
        assert "**2.00**" in trl
        assert "out of memory" in half
    assert {case.device for case in GPU_CASES.values()} == {"cuda"}
    assert not any(case.global_pairs % case.micro_pairs for case in GPU_CASES.values())


@pytest.mark.usefixtures("scripts")
def test_the_products_of_padded_rows_are_those_that_a_plain_forward_pass_makes() -> None:
    from step_cases import QUICK, Pair
    from step_flops import padded_flops
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, Qwen2Config

    case = replace(QUICK, hidden=64, intermediate=256, micro_pairs=2)
    pairs = [Pair([1] * prompt, [1] * 20, [1] * 30, 0.0, 0.0) for prompt in (10, 40, 5)]
    backbone = AutoModelForCausalLM.from_config(Qwen2Config(**case.model_config)).model
    head = sum(3 * 2 * case.hidden * case.vocabulary * 50 for _ in pairs)
    with FlopCounterMode(display=False) as counter:
        for rows, longest in ((4, 70), (2, 35)):
            backbone(torch.ones(rows, longest, dtype=torch.long)).last_hidden_state.sum().backward()
    products, attention = padded_flops(case, pairs)
    assert products == counter.get_total_flops() + head
    assert attention == 12 * case.layers * case.hidden * (4 * 70**2 + 2 * 35**2)
