"""dpo-export writes what training would have written, from any checkpoint, merged or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.cli.export import main

from .conftest import Workplace, assert_same_weights


def exported(*words: str | Path) -> int:
    return main([str(word) for word in words])


def test_the_last_checkpoint_exports_as_the_final_model(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run").returncode == 0
    run = workplace.folder / "run"
    assert exported(run, "--to", workplace.folder / "mine") == 0
    assert_same_weights(load_file(workplace.folder / "mine" / "model.safetensors"), workplace.final_weights("run"))
    assert "beta" in (workplace.folder / "mine" / "README.md").read_text()
    assert exported(run, "--step", "8") == 0
    earlier = load_file(run / "export-step-00000008" / "model.safetensors")
    assert any(not torch.equal(tensor, earlier[name]) for name, tensor in workplace.final_weights("run").items())


def test_an_adapter_is_saved_as_one_and_merged_when_asked(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run", "model.lora.rank=4", "model.lora.merge=false").returncode == 0
    run = workplace.folder / "run"
    final = run / "final"
    assert not (final / "model.safetensors").exists()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in final.iterdir()}
    assert exported(run, "--merge", "--to", workplace.folder / "whole") == 0
    base = next(word for word in workplace.defaults if word.startswith("model.path=")).removeprefix("model.path=")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final).merge_and_unload()
    whole = load_file(workplace.folder / "whole" / "model.safetensors")
    for name, tensor in merged.state_dict().items():
        if name in whole:
            torch.testing.assert_close(whole[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--step", "5"], "no whole checkpoint of step 5"), (["--to", "run"], "exists already")],
)
def test_what_cannot_be_exported_is_told(
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    assert workplace.train("run_dir=run").returncode == 0
    monkeypatch.chdir(workplace.folder)
    assert exported("run", *words) == 2
    assert message in capsys.readouterr().err
