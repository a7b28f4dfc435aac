"""A loss's parameters are checked against its source, which is never imported."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.loss_signature import read_signature
from dpo_cli.config.schema import Config
from dpo_cli.errors import ConfigError
from dpo_cli.losses.dpo import dpo_loss

SOURCE = '''
raise RuntimeError("importing this is not allowed")

def my_loss(pair, *, beta: float, sharpness: int = 2):
    """A loss of the user's."""

def open_loss(pair, **anything): ...

computed_loss = make_loss()
'''


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses.py").write_text(SOURCE)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError\nfrom .inner import hidden_loss as shown_loss\n")
    (package / "inner.py").write_text("def hidden_loss(pair, *, tau: float): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    # Another test may have imported a module of this name.
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)


def configure(*overrides: str) -> Config:
    own = [f"~loss.{name}" for name in inspect.signature(dpo_loss).parameters if name != "pair"]
    return check(compose(Request(("model=qwen2-0.5b", *own, *overrides))))


def test_a_function_of_the_user_is_read_without_importing_it() -> None:
    signature = read_signature("my_losses.my_loss")
    assert signature is not None
    assert [(p.name, p.annotation, p.required) for p in signature.parameters] == [
        ("beta", "float", True),
        ("sharpness", "int", False),
    ]
    assert "my_losses" not in sys.modules


def test_a_re_exported_function_is_followed_to_its_source() -> None:
    signature = read_signature("my_package.shown_loss")
    assert signature is not None
    assert signature.names == ["tau"]


def test_every_loss_of_ours_is_read() -> None:
    signature = read_signature("dpo_cli.losses.dpo.dpo_loss")
    assert signature is not None
    assert {"beta", "label_smoothing", "nll_alpha", "average_logps", "reference_free"} <= set(signature.names)


def test_a_loss_of_the_user_works_through_the_yaml_alone() -> None:
    config = configure("loss._target_=my_losses.my_loss", "loss.beta=-3", "loss.sharpness=4")
    assert config.loss.parameters == {"beta": -3, "sharpness": 4}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss._target_=my_losses.my_loss"], "loss.beta must be given"),
        (["loss._target_=my_losses.my_loss", "loss.beta=1", "loss.sharpnes=1"], "did you mean sharpness?"),
        (["loss._target_=my_losses.my_loss", "loss.beta=1", "loss.sharpness=1.5"], "must be a whole number"),
        (["loss._target_=my_losses.my_los"], "did you mean my_losses.my_loss?"),
        (["loss._target_=my_loses.my_loss"], "There is no Python module my_loses"),
        (["loss._target_=my_loss"], "not a dotted path"),
    ],
)
def test_what_does_not_fit_the_function_is_said(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    assert said in str(caught.value)


def test_a_function_that_takes_anything_or_hides_its_parameters_is_believed() -> None:
    assert configure("loss._target_=my_losses.open_loss", "loss.x=1").loss.parameters == {"x": 1}
    assert configure("loss._target_=my_losses.computed_loss", "loss.x=1").loss.parameters == {"x": 1}
