"""Every configuration file that is shipped composes, checks, and explains itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.keys import known_keys
from dpo_cli.config.schema import Config
from dpo_cli.config.shipped import CONF_FOLDER, RECIPES_FOLDER, choices, documented_keys, shipped_files

# What a user has to bring for a choice to be complete.
BROUGHT = {
    "model=local": ["model.path=./my-model"],
    "data=local": ["data.train=pairs.jsonl"],
    "data=gsm8k_pairs": ["data.train=pairs.jsonl", "data.eval=null"],
}


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data of the user's, from which everything is started."""
    (tmp_path / "my-model").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configure(*overrides: str) -> Config:
    brought = itertools.chain.from_iterable(BROUGHT.get(word, []) for word in overrides)
    return check(compose(Request((*overrides, *brought))))


@pytest.mark.parametrize("loss", choices("loss"))
def test_the_tiny_model_works_with_every_loss_and_data_set(loss: str) -> None:
    for data in choices("data"):
        assert configure("model=tiny", f"loss={loss}", f"data={data}").loss.name == loss


@pytest.mark.parametrize("model", choices("model"))
def test_every_model_works_with_every_loss(model: str) -> None:
    for loss, data in zip(choices("loss"), itertools.cycle(choices("data")), strict=False):
        assert configure(f"model={model}", f"loss={loss}", f"data={data}").loss.name == loss


@pytest.mark.slow
@pytest.mark.parametrize("model", choices("model"))
def test_every_model_works_with_every_loss_and_data_set(model: str) -> None:
    for loss, data in itertools.product(choices("loss"), choices("data")):
        assert configure(f"model={model}", f"loss={loss}", f"data={data}").loss.name == loss


@pytest.mark.parametrize("group", ["optimizer", "hardware", "logger"])
def test_every_other_choice_composes(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.config.logger_checks.find_spec", lambda library: library)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for choice in choices(group):
        value = f"[{choice}]" if group == "logger" else choice
        configure(f"{group}={value}", "model=qwen2-0.5b")


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_composes_once_its_files_are_there(recipe: str, user_folder: Path) -> None:
    for file in (
        "gsm8k_pairs/train.jsonl", "gsm8k_pairs/eval.jsonl", "outputs/gsm8k_small_sft/final/config.json",
        "ranked.jsonl", "gsm8k_sampled.jsonl", "generator.jsonl", "pairs_1.jsonl",
    ):  # fmt: skip
        (user_folder / file).parent.mkdir(parents=True, exist_ok=True)
        (user_folder / file).touch()
    configure(f"recipe={recipe}")


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_tells_its_command_hardware_hours_and_expected_result(recipe: str) -> None:
    header = (RECIPES_FOLDER / f"{recipe}.yaml").read_text().partition("defaults:")[0]
    for told in (f"command:  dpo-train recipe={recipe}", "hardware:", "hours:", "expected:"):
        assert told in header


def test_a_recipe_gives_way_to_the_command_line() -> None:
    config = configure("recipe=ultrafeedback_qwen2_7b", "model=qwen2-0.5b", "optimizer.lr=1e-5", "data=hh_rlhf")
    assert config.model.path == "Qwen/Qwen2-0.5B-Instruct"
    assert config.optimizer.lr == 1e-5
    assert config.data.train[0].path == "Anthropic/hh-rlhf"


@pytest.mark.parametrize("model", [name for name in choices("model") if name not in ("tiny", "local")])
def test_a_real_model_inherits_nothing_from_the_embedded_example(model: str) -> None:
    config = configure(f"model={model}")
    assert config.data.train[0].path == "trl-lib/ultrafeedback_binarized"
    assert (config.loss.parameters["beta"], config.optimizer.lr, config.epochs, config.max_steps) == (
        0.1,
        5e-7,
        1,
        None,
    )


def test_the_tiny_model_brings_its_data_and_its_pull() -> None:
    config = configure()
    assert config.data.train[0].path.startswith("dpo_cli://example/")
    assert config.loss.parameters["beta"] > 0.1
    assert config.optimizer.lr > 1e-5


def test_the_command_line_wins_over_what_the_tiny_model_brings() -> None:
    config = configure("data=local", "loss.beta=0.3", "max_steps=7", "optimizer.warmup_steps=0")
    assert config.data.train[0].path == "pairs.jsonl"
    assert (config.loss.parameters["beta"], config.max_steps) == (0.3, 7)


def test_imitation_takes_larger_steps_than_preference_on_a_real_model() -> None:
    assert configure("model=qwen2-7b", "loss=sft_ref").optimizer.lr == 1e-5


@pytest.mark.parametrize("name", [name for name in shipped_files() if not name.startswith(("preset/", "recipe/"))])
def test_every_key_is_explained_above_it(name: str) -> None:
    keys = documented_keys(shipped_files()[name])
    nested = {key.name.rpartition(".")[0] for key in keys}
    group_file = name not in ("config.yaml",) and not Path(name).stem.startswith("_")
    # A key that a base file explains already need not be explained again where another value is given to it.
    inherited = {key.name for base in CONF_FOLDER.glob("*/_base.yaml") for key in documented_keys(base)}
    # Keys that stand under one comment share it.
    shared = {"undesirable_weight"}
    bare = [key.name for key in keys if not key.meaning and key.name not in nested]
    assert not [key for key in bare if not (group_file and key in inherited | shared | {"name"})]


def test_the_schema_and_the_shipped_files_know_the_same_keys() -> None:
    values = compose(Request(("model=qwen2-0.5b",))).values

    def dotted(section: dict[str, object], prefix: str = "") -> set[str]:
        return {
            name
            for key, value in section.items()
            for name in (dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"})
        }

    named = {key for key in dotted(values) if not key.startswith("loss._")}
    known = {key for key in known_keys(values) if not key.startswith("logger")}
    assert known == {key for key in named if not key.startswith("logger")}


def test_every_shipped_file_is_valid_yaml_with_unix_line_ends() -> None:
    for file in shipped_files().values():
        text = file.read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(text), dict)
        assert "\r" not in text
        assert "\t" not in text
