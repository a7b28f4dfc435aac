"""From override words and files to values, and to the place where each was set."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.compose.overrides import expand_sweep, parse_overrides
from dpo_cli.config.schema import Config

REAL = "model=qwen2-0.5b"


def configure(*overrides: str, config_dir: Path | None = None, config_name: str = "config") -> Config:
    return check(compose(Request(overrides, config_dir, config_name)))


def test_a_template_on_the_command_line_keeps_braces_spaces_commas_and_escapes() -> None:
    word = r"data.prompt_template=Question, please: {question}\n\nAnswer: "
    assert configure(REAL, word).data.prompt_template == r"Question, please: {question}\n\nAnswer: "


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_template_may_be_quoted_for_hydra_as_well(quote: str) -> None:
    word = rf"data.prompt_template={quote}Q: {{question}}\nA: {quote}"
    assert configure(REAL, word).data.prompt_template == r"Q: {question}\nA: "


def test_loggers_are_a_list_and_may_be_none() -> None:
    assert configure(REAL, "logger=[tensorboard]").logger.tensorboard is not None
    assert configure(REAL, "logger=[]").logger.tensorboard is None
    assert configure(REAL, "logger=[]").as_dict()["logger"] == {}


def test_lora_is_switched_on_by_its_rank_alone() -> None:
    assert configure(REAL).model.lora is None
    lora = configure(REAL, "model.lora.rank=16").model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.target_modules) == (16, 32, "all-linear")


def test_columns_are_mapped_one_by_one() -> None:
    config = configure(REAL, "data.columns.prompt=question", "data.columns.chosen=best")
    assert config.data.columns == {"prompt": "question", "chosen": "best"}


def test_weighted_sources_keep_their_order() -> None:
    config = configure(REAL, "data.train=[{path: org/a, weight: 2}, org/b]")
    assert [(source.path, source.weight) for source in config.data.train] == [("org/a", 2.0), ("org/b", 1.0)]


def test_what_is_saved_of_a_configuration_checks_to_the_same_configuration() -> None:
    config = configure(REAL, "model.lora.rank=8", "data.train=[{path: org/a, weight: 2}, org/b]", "optimizer=rmsprop")
    assert Config.model_validate(config.as_dict()) == config


def test_now_is_one_moment_however_often_it_is_asked(tmp_path: Path) -> None:
    started = time.strptime("2024-02-03 04:05:06", "%Y-%m-%d %H:%M:%S")
    values = compose(Request((REAL, "store_dir=${run_dir}/store")), started=started).values
    assert values["run_dir"] == "outputs/2024-02-03_04-05-06"
    assert values["store_dir"] == "outputs/2024-02-03_04-05-06/store"


def test_the_user_environment_names_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_STORE_DIR", "/somewhere")
    assert configure(REAL).store_dir == "/somewhere"
    monkeypatch.delenv("DPO_STORE_DIR")
    assert configure(REAL).store_dir == "~/.cache/dpo-cli"


def test_every_key_remembers_the_file_or_command_line_that_set_it(tmp_path: Path) -> None:
    (tmp_path / "my_run.yaml").write_text("defaults: [config, override model: qwen2-7b, _self_]\nseed: 7\n")
    composition = compose(Request(("loss.beta=0.2",), tmp_path, "my_run"))
    assert composition.place("loss.beta") == "command line"
    assert composition.place("seed") == str(tmp_path / "my_run.yaml")
    assert composition.place("model.path") == "conf/model/qwen2-7b.yaml (shipped)"
    assert composition.place("model.dtype") == "conf/model/_base.yaml (shipped)"
    assert composition.place("epochs") == "conf/config.yaml (shipped)"


def test_a_user_file_stands_on_the_shipped_ones(tmp_path: Path) -> None:
    # my_conf/my_run.yaml, started by: dpo-train --config-dir my_conf --config-name my_run
    (tmp_path / "my_run.yaml").write_text(
        "defaults:\n  - config\n  - override model: qwen2-7b\n  - override loss: mine\n  - _self_\n\nepochs: 2\n"
    )
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text(
        "_target_: dpo_cli.losses.hinge.hinge_loss\n_partial_: true\nbeta: 0.25\n"
    )
    config = configure("seed=1", config_dir=tmp_path, config_name="my_run")
    assert (config.model.path, config.loss.parameters) == ("Qwen/Qwen2-7B-Instruct", {"beta": 0.25})
    assert (config.epochs, config.seed) == (2, 1)
    # Chosen as a file of its group, without a primary file.
    assert configure(REAL, "loss=mine", config_dir=tmp_path).loss.parameters == {"beta": 0.25}


def test_a_user_recipe_is_chosen_like_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: llama3-8b]\nglobal_pairs: 16\n"
    )
    config = configure("recipe=mine", config_dir=tmp_path)
    assert (config.model.path, config.global_pairs) == ("meta-llama/Meta-Llama-3-8B-Instruct", 16)


def test_a_sweep_is_the_product_of_its_values_in_order() -> None:
    overrides, problems = parse_overrides(["loss.beta=0.1,0.5", "model=tiny", "seed=range(1,3)"], sweep=True)
    assert not problems
    assert expand_sweep(overrides) == [
        ["loss.beta=0.1", "model=tiny", "seed=1"],
        ["loss.beta=0.1", "model=tiny", "seed=2"],
        ["loss.beta=0.5", "model=tiny", "seed=1"],
        ["loss.beta=0.5", "model=tiny", "seed=2"],
    ]


def test_a_template_with_commas_is_not_a_sweep() -> None:
    word = "data.prompt_template=Question, please: {question}"
    overrides, problems = parse_overrides([word, "seed=1,2"], sweep=True)
    assert not problems
    assert expand_sweep(overrides) == [[word, "seed=1"], [word, "seed=2"]]
