"""Configurations of TRL, LLaMA-Factory and axolotl become ones that dpo-train accepts and that say the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.cli.convert_config import main
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.foreign.convert import convert
from dpo_cli.config.foreign.dialects import DIALECTS, LOSSES, TRL
from dpo_cli.config.schema import AdamWConfig, Config
from dpo_cli.config.shipped import choices

FILES = Path(__file__).parent / "foreign"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in FILES.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(file: str, *words: str) -> tuple[Config, str]:
    assert main([file, "--to", "mine.yaml", *words]) == 0
    return check(compose(Request(config_dir=Path(), config_name="mine"))), Path("mine.yaml").read_text()


def test_trl(folder: Path) -> None:
    config, text = converted("trl.yaml", "--gpus", "4")
    assert (config.global_pairs, config.optimizer.lr, config.data.max_tokens) == (64, 5e-6, 1024)
    assert config.loss.parameters["losses"][1] == {"loss": "sft_ref", "weight": 0.5}
    assert (config.model.lora and config.model.lora.rank, config.hardware.zero_stage) == (32, 2)
    assert (config.eval_every, config.data.eval_split) == (50, "test")
    assert "push_to_hub=true: dpo-export RUN --push" in text


def test_llama_factory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its data sets go by names that only its registry knows."""
    assert main(["llama_factory.yaml"]) == 1
    said = capsys.readouterr()
    assert "data.train must be given" in said.err
    assert "dpo_en_demo: it is not in" in said.out
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"dpo_en_demo": {"file_name": "demo.jsonl"}}))
    (folder / "data" / "demo.jsonl").touch()
    config, text = converted("llama_factory.yaml")
    assert [source.path for source in config.data.train] == ["data/demo.jsonl"]
    assert (config.global_pairs, config.epochs, config.optimizer.schedule) == (8, 3.0, "cosine")
    assert (config.model.lora and config.model.lora.alpha) == 16
    assert "warmup_ratio=0.1: warm-up is counted in steps" in text


def test_axolotl(folder: Path) -> None:
    config, text = converted("axolotl.yaml")
    assert (config.model.path, config.optimizer.lr) == ("mlabonne/Daredevil-8B-abliterated", 5e-6)
    assert (config.hardware.zero_stage, config.optimizer.warmup_steps, config.data.max_tokens) == (3, 100, 2048)
    assert isinstance(config.optimizer, AdamWConfig)
    assert config.optimizer.state_bits == 32
    for left in ("load_in_4bit", "lora_dropout", "chat_template", "8 bits"):
        assert left in text.partition("defaults:")[0]


def test_tokens_are_not_carried_into_the_head() -> None:
    token = "hf_" + "a" * 34
    settings = {"loss_type": "ipo", "hub_token": token, "hub": {"api_key": "abc"}, "url": f"https://x:{token}@host"}
    text = convert(settings, gpus=1, folder=Path()).text("x.yaml")
    assert 'hub_token="****": hf auth login' in text
    assert token[:20] not in text and "abc" not in text


def test_every_loss_is_one_of_ours() -> None:
    for kind in LOSSES:
        done = convert({"model_name_or_path": "a/b", "dataset_name": "c/d", "loss_type": kind}, gpus=1, folder=Path())
        assert done.choices["loss"] in choices("loss")


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        ({"stage": "kto", "kto_chosen_weight": 2}, "loss.desirable_weight", 2.0),
        ({"stage": "dpo", "pref_loss": "simpo", "simpo_gamma": 1.5}, "loss.gamma", 1.5),
        ({"stage": "dpo", "pref_ftx": 0.5}, "loss.nll_alpha", 0.5),
        ({"stage": "dpo", "disable_gradient_checkpointing": True}, "model.gradient_checkpointing", False),
        ({"loss_type": "sigmoid", "max_steps": 200, "warmup_ratio": 0.1}, "optimizer.warmup_steps", 20),
        ({"loss_type": "sigmoid", "max_grad_norm": 0}, "optimizer.max_grad_norm", None),
        ({"rl": "ipo", "rl_beta": "1e-1"}, "loss.beta", 0.1),
        ({"rl": "simpo"}, "loss.nll_alpha", 1.0),
        ({"loss_type": "robust"}, "loss.label_smoothing", 0.0),
        ({"rl": "dpo", "deepspeed": {"zero_optimization": {"stage": 3}}}, "choice", "deepspeed_zero3"),
    ],
)
def test_single_keys(settings: dict[str, Any], key: str, value: object) -> None:
    done = convert(settings | {"learning_rate": "5e-6"}, gpus=1, folder=Path())
    assert (done.choices["hardware"] if key == "choice" else done.values[key]) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "no key by which"),
        ("- a", "no keys and values"),
        ("a: [", "no YAML"),
        ("loss_type: ipo\nlearning_rate: high", "not of the kind its key has"),
    ],
)
def test_what_is_none_of_them_is_refused(
    text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "x.yaml").write_text(text)
    assert main(["x.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert main(["trl.yaml", "--to", "x.yaml"]) == 2
    assert "nothing is written over" in capsys.readouterr().err


@pytest.mark.slow
def test_what_trl_takes_for_granted_is_what_it_says() -> None:
    from trl import DPOConfig, ModelConfig

    theirs = {item.name: item.default for kind in (DPOConfig, ModelConfig) for item in dataclasses.fields(kind)}
    theirs["loss_type"] = "sigmoid"
    assert {name: theirs[name] for name in TRL.defaults} == dict(TRL.defaults)
    assert all(dialect.marks for dialect in DIALECTS)
