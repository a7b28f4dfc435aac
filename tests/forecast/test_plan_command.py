"""`dpo-train ... plan=true` from the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from forecast_shapes import QWEN2_HALF_BILLION, QWEN2_SEVEN_BILLION

from dpo_cli.cli.train import main
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.forecast.machine import Machine
from dpo_cli.forecast.memory import GIB
from dpo_cli.forecast.plan import plan_or_nothing, plan_run
from dpo_cli.forecast.report import summary


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start from, with nothing but models that have no weights, and some data."""
    monkeypatch.chdir(tmp_path)
    for name, config in {"half": QWEN2_HALF_BILLION, "seven": QWEN2_SEVEN_BILLION, "odd": {"model_type": "x"}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "pairs.jsonl").touch()
    return tmp_path


WORDS = ("model=local", "data=local", "data.train=pairs.jsonl", "hardware.device_memory_gb=80")


def test_a_plan_starts_nothing_and_makes_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main([*WORDS, "model.path=seven", "run_dir=mine", "plan=true"]) == 0
    assert sorted(folder.rglob("*")) == before
    assert capsys.readouterr().err == ""


def test_a_plan_tells_what_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "model.path=seven", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "7,615,616,512 parameters by config.json, computed in half precision" in said
    # 8 bytes for each of 7.6e9 parameters.
    assert re.search(r"optimiser states +56\.74 GiB", said)
    assert "It does not fit: 80.00 GiB are there" in said
    assert re.search(r"low-rank adapters: \d+\.\d\d GiB\n +.*model\.lora\.rank=16", said)


def test_what_is_proposed_can_be_typed_and_then_fits(capsys: pytest.CaptureFixture[str]) -> None:
    main([*WORDS, "model.path=seven", "plan=true"])
    said = capsys.readouterr().out
    proposals = re.findall(r"^  [\w -]+: (\S+ \S+)\n      (.+)$", said, flags=re.MULTILINE)
    assert proposals
    for total, words in proposals:
        assert main([*WORDS, "model.path=seven", *words.split(), "plan=true"]) == 0
        said = capsys.readouterr().out
        assert "It fits: " in said
        assert re.search(rf"total +{re.escape(total)}", said)


def test_a_plan_for_eight_workers_divides_by_eight(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "model.path=seven", "hardware=deepspeed_zero3", "hardware.num_workers=8", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "layout: ZeRO stage 3, 8 workers" in said
    # A float32 master and two moments of 7,615,616,512 / 8 parameters.
    assert re.search(r"float32 masters +3\.55 GiB", said)
    assert re.search(r"optimiser states +7\.09 GiB", said)


def test_a_plan_tells_what_workers_exchange(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "model.path=seven", "global_pairs=64", "tokens_per_microbatch=8192", "data.max_tokens=2048"]
    assert main([*words, "plan=true"]) == 0
    assert "exchange:" not in capsys.readouterr().out
    assert main([*words, "hardware=deepspeed_zero2", "hardware.num_workers=8", "plan=true"]) == 0
    # Two pairs of 3,072 tokens a row; 4 bytes of 7,615,616,512 gradients four times, and 2 of the new weights once.
    said = capsys.readouterr().out
    assert "exchange: 137.1 GB gathered and 121.8 GB summed a step of 4 micro-batches\n" in said
    main([*words, "hardware=deepspeed_zero2", "hardware.num_workers=8", "hardware.device_tflops=989", "plan=true"])
    assert re.search(r"4 micro-batches; it takes as long as computing at \d+\.\d GB/s", capsys.readouterr().out)


def test_a_plan_under_a_launcher_counts_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = check(compose(Request((*WORDS, "model.path=seven", "hardware=deepspeed_zero3"))))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan_run(config).layout.workers == 4


def test_a_plan_counts_with_deepspeed_s_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "model.path=seven", "hardware=deepspeed_zero3", "hardware.num_workers=8", "plan=true"]
    options = {"reduce_bucket_size": "5e8", "stage3_max_live_parameters": "2000000000"}
    assert (
        main([*words, *(f"+hardware.deepspeed.zero_optimization.{key}={value}" for key, value in options.items())]) == 0
    )
    said = capsys.readouterr().out
    # 2 bytes of an eighth of 7,615,616,512 weights and of 2e9 that are gathered.
    assert re.search(r"parameters +5\.50 GiB +5\.50 GiB", said)
    # A bucket of 5e8 in float32, a copy of the embeddings, 544,997,376, which are larger, and, as not all weights are
    # kept for the backward pass, 5e7 of them and the head on their way in half precision.
    assert re.search(r"communication +[\d.]+ GiB +5\.00 GiB", said)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("reduce_bucket_size", "reduce_bucket"),
        ("stage3_prefetch_bucket_size", "prefetch_bucket"),
        ("prefetch_bucket_size", "prefetch_bucket"),
        ("stage3_max_live_parameters", "live_parameters"),
        ("sub_group_size", "sub_group"),
        ("stage3_max_reuse_distance", "reuse_distance"),
    ],
)
def test_every_bound_of_deepspeed_s_reaches_the_layout(option: str, name: str) -> None:
    words = (
        *WORDS,
        "model.path=seven",
        "hardware=deepspeed_zero3",
        f"+hardware.deepspeed.zero_optimization.{option}=7",
    )
    layout = plan_run(check(compose(Request(words))), Machine(on_gpu=True, device_bytes=None)).layout
    assert getattr(layout, name) == 7


def test_a_plan_tells_disk_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "model.path=half", "hardware.device_tflops=100", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "disk: 5.9 GB a checkpoint, 17.8 GB with all that are kept" in said
    assert re.search(r"time: [\d.]+ s a step at most, if 40% of 100 TFLOPS are reached", said)
    assert main([*WORDS, "model.path=half", "plan=true"]) == 0
    assert "hardware.device_tflops=..." in capsys.readouterr().out


def test_a_plan_for_a_cpu_is_in_float32_and_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "model.path=half", "hardware.device=cpu", "plan=true"]) == 0
    said = capsys.readouterr().out
    assert "computed in float32" in said
    assert "CUDA" not in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.path=odd"], "states no hidden_size"),
        (["model.path=absent"], "absent"),
        (["model.path=half", "hardware.device_memory_gb=0"], "greater than 0"),
    ],
)
def test_a_plan_that_cannot_be_made_is_bad_input(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([*WORDS, *words, "plan=true"]) == 2
    assert told in capsys.readouterr().err


def test_a_sweep_is_not_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert main(["-m", *WORDS, "model.path=half", "plan=true", "loss.beta=0.1,0.2"]) == 2
    assert "plan=true tells of one run" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_run_says_the_same_in_one_line() -> None:
    config = check(compose(Request((*WORDS, "model.path=seven"))))
    machine = Machine(on_gpu=True, device_bytes=80 * GIB)
    line = summary(plan_run(config, machine))
    assert re.fullmatch(
        r"forecast: \d+\.\d\d GiB at the peak of 80\.00 GiB on the GPU; 91\.4 GB a checkpoint, 15\.2 GB for final/; "
        r"that may not fit: plan=true tells what would",
        line,
    )


def test_a_model_without_sizes_does_not_keep_a_run_from_starting() -> None:
    config = check(compose(Request((*WORDS, "model.path=odd"))))
    assert plan_or_nothing(config, Machine(on_gpu=True, device_bytes=None)) is None


def test_planning_is_quick_enough_to_be_asked_often() -> None:
    import subprocess

    program = (
        "import sys; from dpo_cli.cli.train import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, *WORDS, "model.path=half", "plan=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    assert done.stdout.splitlines()[-1] == "0 []"
