"""Code that comes with a model runs when it is asked for, and only then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, save, settings

from dpo_cli.errors import ModelError
from dpo_cli.policy.export import export_final
from dpo_cli.policy.load import load_model
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.self_test import packed_self_test

CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM

Path({witness!r}).touch()

class HomeMadeConfig(Qwen2Config):
    model_type = "home-made"

class HomeMadeForCausalLM(Qwen2ForCausalLM):
    config_class = HomeMadeConfig
"""


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exists once the model's code has run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "witness"


@pytest.fixture
def folder(tmp_path: Path, witness: Path) -> Path:
    folder = save(tmp_path / "home-made")
    (folder / "home_made.py").write_text(CODE.format(witness=str(witness)))
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "home-made", "architectures": ["HomeMadeForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "home_made.HomeMadeConfig",
        "AutoModelForCausalLM": "home_made.HomeMadeForCausalLM",
    }
    file.write_text(json.dumps(config))
    return folder


def test_it_is_not_run_unasked_and_the_message_says_how_to_ask(folder: Path, witness: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        load_model(settings(folder), device=torch.device("cpu"), seed=0)
    assert not witness.exists()


def test_asked_for_it_is_loaded_scored_and_exported_with_its_code(folder: Path, witness: Path, tmp_path: Path) -> None:
    chosen = settings(folder, trust_remote_code=True)
    loaded = load_model(chosen, device=torch.device("cpu"), seed=0)
    assert witness.exists()
    packed_self_test(PackedModel(loaded.model), vocabulary=VOCABULARY, where="folder")
    export_final(loaded, tmp_path / "final", card="")
    assert (tmp_path / "final" / "home_made.py").is_file()
    again = load_model(settings(tmp_path / "final", trust_remote_code=True), device=torch.device("cpu"), seed=0)
    assert type(again.model).__name__ == "HomeMadeForCausalLM"
