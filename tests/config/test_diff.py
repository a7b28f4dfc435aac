"""What may change when a run goes on, and what would make another experiment of it."""

from __future__ import annotations

import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.diff import ABSENT, Change, diff, refuse_another_experiment
from dpo_cli.errors import ConfigError


def settings(*overrides: str) -> dict[str, object]:
    return check(compose(Request(("model=qwen2-0.5b", "run_dir=r", *overrides)))).as_dict()


def test_a_diff_names_every_leaf_that_differs() -> None:
    old = {"a": 1, "b": {"c": 2, "d": [1, 2]}, "gone": 3}
    new = {"a": 1, "b": {"c": 4, "d": [1, 3]}, "came": None}
    assert diff(old, new) == [
        Change("b.c", 2, 4),
        Change("b.d", [1, 2], [1, 3]),
        Change("came", ABSENT, None),
        Change("gone", 3, ABSENT),
    ]


@pytest.mark.parametrize(
    "override",
    [
        "log_every=1", "eval_every=0", "save_every=7", "keep_checkpoints=9", "logger=[]", "run_dir=moved",
        "store_dir=s", "log_level=error",
        "tokens_per_microbatch=4096", "hardware.device=cpu", "model.gradient_checkpointing=true", "data.workers=3",
        "model.attention=sdpa", "model.pad_rows_to=64",
        "optimizer.schedule=linear",
    ],
)  # fmt: skip
def test_settings_of_the_machine_may_change(override: str) -> None:
    refuse_another_experiment(settings(), settings(override), run_folder="r")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "global_pairs=8", "loss.beta=0.2", "loss=ipo", "optimizer.lr=1e-6", "optimizer=rmsprop", "epochs=2",
        "max_steps=100", "data.max_tokens=99", "data=hh_rlhf", "model=qwen2-7b", "model.lora.rank=8",
        "model.dtype=float32",
        "model.reference=start", "deterministic=true",
    ],
)  # fmt: skip
def test_settings_of_the_experiment_are_refused_with_the_difference_shown(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_another_experiment(settings(), settings(override), run_folder="r")
    assert " -> " in caught.value.message


def test_all_refused_changes_are_shown_together() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_another_experiment(settings(), settings("seed=1", "loss.beta=0.2", "log_every=3"), run_folder="r")
    assert "seed: 42 -> 1" in caught.value.message
    assert "loss.beta: 0.1 -> 0.2" in caught.value.message
    assert "log_every" not in caught.value.message


def test_a_run_with_a_constant_learning_rate_may_be_made_longer() -> None:
    constant = "optimizer.schedule=constant"
    refuse_another_experiment(settings(constant), settings(constant, "epochs=3"), run_folder="r")
