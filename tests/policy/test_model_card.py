"""The card says what a reader must know, and nothing that must stay secret."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import dpo_cli
from dpo_cli.config.secrets import without_secrets
from dpo_cli.config.shipped import CONF_FOLDER, choices
from dpo_cli.policy.citations import DPO, PAPERS
from dpo_cli.policy.model_card import Result, model_card

TOKEN = "hf_" + "a1B2" * 8


def card(**changes: object) -> str:
    values: dict[str, object] = {
        "name": "qwen2-dpo",
        "base": "Qwen/Qwen2-0.5B",
        "reference": "the policy's own start",
        "data": ["trl-lib/ultrafeedback_binarized", "pairs.jsonl"],
        "loss": "dpo",
        "formula": "-log sigmoid(beta * margin)",
        "config": {"loss": {"beta": 0.1}, "model": {"path": "Qwen/Qwen2-0.5B"}},
        "results": [Result("task accuracy", 0.512, 0.5735, (0.03, 0.09)), Result("rewards/accuracies", 0.5, 0.71)],
        "versions": {"dpo-cli": "0.1.0", "torch": "2.13.0"},
    }
    return model_card(**(values | changes))  # type: ignore[arg-type]


def header(text: str) -> dict[str, object]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def test_the_header_is_what_the_hub_reads() -> None:
    found = header(card())
    assert found["base_model"] == "Qwen/Qwen2-0.5B"
    assert found["library_name"] == "transformers"
    assert found["datasets"] == ["trl-lib/ultrafeedback_binarized"]
    assert "dpo" in found["tags"]  # type: ignore[operator]


def test_a_local_base_is_stated_but_not_offered_to_the_hub() -> None:
    text = card(base="/home/me/models/base", data=["/home/me/pairs.jsonl"])
    assert "base_model" not in header(text)
    assert "datasets" not in header(text)
    assert "**Base**: `/home/me/models/base`" in text


def test_the_whole_configuration_can_be_read_back() -> None:
    block = card().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {"loss": {"beta": 0.1}, "model": {"path": "Qwen/Qwen2-0.5B"}}


def test_results_show_before_after_change_and_interval() -> None:
    assert "| task accuracy | 0.512 | 0.5735 | +0.0615 (95 % interval +0.03 to +0.09) |" in card()
    assert "| rewards/accuracies | 0.5 | 0.71 | +0.21 |" in card()
    assert "No held-out data was given." in card(results=[])


def test_an_adapter_and_lora_are_stated() -> None:
    text = card(adapter="my-sft", lora=True, reference="the base with the adapter")
    assert "with the adapter `my-sft` merged in" in text
    assert "LoRA" in text


def test_secrets_are_blotted_out_wherever_they_stand() -> None:
    text = card(
        config={"hub_password": "hunter2", "note": f"use {TOKEN}", "url": "https://me:secret@host/x", "list": [TOKEN]},
        data=[f"https://me:{TOKEN}@host/pairs.jsonl"],
    )
    assert TOKEN not in text
    assert "hunter2" not in text
    assert "me:secret" not in text


def test_masking_leaves_ordinary_values_alone() -> None:
    values = {"max_tokens": 512, "tokens_per_microbatch": 4096, "keys": ["a"], "beta": 0.1, "none": None, "flag": True}
    assert without_secrets(values) == values


def test_dpo_and_the_paper_of_the_loss_are_cited_and_no_licence_is_made_up() -> None:
    text = card(loss="simpo")
    assert "eprint = {2305.18290}" in text
    assert "eprint = {2405.14734}" in text
    assert "license" not in header(text)
    assert card().count("@misc") == 1


@pytest.mark.parametrize("loss", choices("loss"))
def test_what_is_cited_is_the_source_that_the_loss_names(loss: str) -> None:
    target = yaml.safe_load((CONF_FOLDER / "loss" / f"{loss}.yaml").read_text())["_target_"]
    told = Path(dpo_cli.__file__).parent.joinpath(*target.split(".")[1:-1]).with_suffix(".py").read_text()
    if loss in PAPERS:
        assert PAPERS[loss].arxiv in told
    else:
        # DPO itself, what it comes with, and our own.
        assert DPO.arxiv in told


def test_examples_step_and_versions_are_stated() -> None:
    text = card(examples="90 training (of 96 rows; dropped: 6 identical)", step=1200, notes=["It ranks 53 %."])
    for told in ("90 training (of 96 rows", "**Step**: 1,200", "dpo-cli 0.1.0, torch 2.13.0", "It ranks 53 %."):
        assert told in text
