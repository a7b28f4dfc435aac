"""What the loop learns of a loss before it runs it, for ours and for a user's own."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
import sys
import types as python_types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

import dpo_cli
import dpo_cli.losses
from dpo_cli.errors import LossInputError
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.kto import kto_loss
from dpo_cli.losses.log_ratios import pair_log_ratios
from dpo_cli.losses.mix import mix_loss
from dpo_cli.losses.types import (
    Declaration,
    DemonstrationLogps,
    LossValues,
    PairLogps,
    RankedLogps,
    UnpairedLogps,
    as_loss_values,
    declaration_of,
    declare,
)

if TYPE_CHECKING:
    from dpo_cli.losses import types as seen_by_type_checkers_only

PAIR = Declaration(PairLogps)
DECLARED = {
    "dpo": PAIR,
    "robust_dpo": PAIR,
    "ipo": PAIR,
    "hinge": PAIR,
    "apo_zero": PAIR,
    "apo_down": PAIR,
    "exo_pair": PAIR,
    "nca_pair": PAIR,
    "sppo_hard": PAIR,
    "discopop": PAIR,
    "sigmoid_norm": PAIR,
    "pdpo": Declaration(PairLogps, on_policy=True),
    "simpo": Declaration(PairLogps, needs_reference=False),
    "cpo": Declaration(PairLogps, needs_reference=False),
    "orpo": Declaration(PairLogps, needs_reference=False),
    "aot": Declaration(PairLogps, couples_batch=True),
    "aot_unpaired": Declaration(PairLogps, couples_batch=True),
    "bco_pair": Declaration(PairLogps, couples_batch=True),
    "mix": PAIR,
    "kto": Declaration(UnpairedLogps, couples_batch=True),
    "plackett_luce": Declaration(RankedLogps),
    "sft_ref": Declaration(DemonstrationLogps, normaliser="tokens", needs_reference=False),
}


def shipped(name: str) -> Callable[..., Any]:
    loss: Callable[..., Any] = getattr(import_module(f"dpo_cli.losses.{name}"), f"{name}_loss")
    return loss


def test_every_shipped_loss_is_in_the_list_above() -> None:
    modules = {module.name for module in pkgutil.iter_modules(dpo_cli.losses.__path__)}
    assert modules - {"types", "log_ratios", "f_divergence"} == set(DECLARED)


@pytest.mark.parametrize("name", DECLARED)
def test_shipped_losses_declare_what_they_need(name: str) -> None:
    assert declaration_of(shipped(name)) == DECLARED[name]


@pytest.mark.parametrize("name", DECLARED)
def test_shipped_losses_take_named_parameters_and_say_their_source(name: str) -> None:
    loss = shipped(name)
    _, *parameters = inspect.signature(loss).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    documented = inspect.getdoc(loss) or ""
    assert "arXiv:" in documented and "value" in documented
    assert all(parameter.name in documented for parameter in parameters)


def test_the_kind_of_example_follows_from_the_input() -> None:
    kinds = {name: declaration.kind for name, declaration in DECLARED.items()}
    assert (kinds["dpo"], kinds["plackett_luce"], kinds["kto"], kinds["sft_ref"]) == (
        "pair",
        "ranked",
        "unpaired",
        "demonstration",
    )


# --- defaults --------------------------------------------------------------------------------------------------------

PACKAGE = Path(dpo_cli.__file__).parent


def shipped_parameters(name: str) -> dict[str, Any]:
    section = OmegaConf.to_container(OmegaConf.load(PACKAGE / "conf" / "loss" / f"{name}.yaml"))
    assert isinstance(section, dict) and section.pop("_target_") == f"dpo_cli.losses.{name}.{name}_loss"
    assert section.pop("_partial_") is True
    return {str(key): value for key, value in section.items()}


@pytest.mark.parametrize("name", DECLARED)
def test_a_default_is_the_same_in_the_shipped_yaml_and_in_the_function(name: str) -> None:
    parameters = dict(list(inspect.signature(shipped(name)).parameters.items())[1:])
    configured = shipped_parameters(name)
    assert configured.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert parameter.default in (inspect.Parameter.empty, configured[key])


@pytest.mark.parametrize("name", DECLARED)
def test_the_documented_defaults_are_the_shipped_ones(name: str) -> None:
    page = PACKAGE.parent / "docs" / "losses.md"
    if not page.exists():
        pytest.skip("the documentation does not travel with an installed package")
    (row,) = [line for line in page.read_text().splitlines() if line.startswith(f"| `{name}` | `")]
    written = dict(re.findall(r"\b(\w+)=(\[.*?\]|[\w.]+)", row.split(" | ")[2]))
    assert {key: yaml.safe_load(value) for key, value in written.items()} == shipped_parameters(name)


# --- reference_free --------------------------------------------------------------------------------------------------


def test_reference_free_dpo_declares_that_it_needs_no_reference() -> None:
    assert declaration_of(functools.partial(dpo_loss, beta=0.1)).needs_reference
    assert declaration_of(functools.partial(dpo_loss, beta=0.1, reference_free=False)).needs_reference
    free = functools.partial(dpo_loss, beta=0.1, reference_free=True)
    assert declaration_of(free) == Declaration(PairLogps, needs_reference=False)
    # A partial of a partial: the outer one has the last word, as it has in the call.
    outer = functools.partial(functools.partial(dpo_loss, reference_free=False), **free.keywords)
    assert not declaration_of(outer).needs_reference
    assert declaration_of(functools.partial(free, reference_free=False)).needs_reference


def test_weighted_dpo_asks_for_what_its_weights_are_made_of() -> None:
    assert declaration_of(functools.partial(dpo_loss, beta=0.1, use_weighting=False)) == PAIR
    weighted = functools.partial(dpo_loss, beta=0.1, use_weighting=True)
    assert declaration_of(weighted) == Declaration(PairLogps, statistics=frozenset({"log_sum_squared_probs"}))


def test_ld_alpha_is_the_tail_weight_of_a_loss_on_pairs() -> None:
    assert declaration_of(functools.partial(dpo_loss, beta=0.1)).tail_weight == 1
    assert declaration_of(functools.partial(dpo_loss, beta=0.1, ld_alpha=0)) == Declaration(PairLogps, tail_weight=0.0)

    def ranked(ranked: RankedLogps, *, ld_alpha: float = 0.5) -> LossValues: ...

    assert declaration_of(ranked).tail_weight == 1


def test_a_mix_needs_what_its_parts_need() -> None:
    def mixed(*losses: dict[str, Any]) -> Declaration:
        return declaration_of(functools.partial(mix_loss, beta=0.1, losses=[{"weight": 1, **each} for each in losses]))

    assert mixed({"loss": "dpo"}, {"loss": "sft_ref"}) == PAIR
    assert mixed({"loss": "cpo"}, {"loss": "sft_ref"}) == Declaration(PairLogps, needs_reference=False)
    assert mixed({"loss": "cpo"}, {"loss": "hinge"}) == PAIR
    assert mixed({"loss": "dpo"}, {"loss": "aot"}) == Declaration(PairLogps, couples_batch=True)
    weighted = mixed({"loss": "dpo", "use_weighting": True}, {"loss": "ipo"})
    assert weighted == Declaration(PairLogps, statistics=frozenset({"log_sum_squared_probs"}))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([{"loss": "kto", "weight": 1}], "kto cannot be part of a mix: it does not take pairs"),
        ([{"loss": "pdpo", "weight": 1, "gamma": 0.3}], "learns from samples"),
        ([{"loss": "dpo", "weight": 1, "ld_alpha": 0.5}], "ld_alpha"),
        ([{"loss": "dpo", "weight": 1}, {"loss": "dpo", "weight": 2}], "names dpo twice"),
        ([{"loss": "my_losses.nothing", "weight": 1}], "cannot be imported"),
    ],
)
def test_what_cannot_be_mixed_is_refused(losses: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(LossInputError, match=said):
        declaration_of(functools.partial(mix_loss, beta=0.1, losses=losses))


def test_reference_free_may_be_a_default_of_a_users_loss() -> None:
    def mine(pair: PairLogps, *, reference_free: bool = True) -> LossValues: ...

    assert not declaration_of(mine).needs_reference
    assert declaration_of(functools.partial(mine, reference_free=False)).needs_reference


# --- a user's own loss -----------------------------------------------------------------------------------------------

OWN_LOSS = """
import torch.nn.functional as F

def cautious_loss(pair, *, beta, floor=0.0):
    margin = beta * (
        (pair.policy_chosen - pair.reference_chosen) - (pair.policy_rejected - pair.reference_rejected)
    )
    return -F.logsigmoid(margin).clamp(max=-floor)
"""


def a_pair() -> PairLogps:
    columns = torch.tensor([[-9.0, -4.0], [-8.0, -6.0], [-9.5, -4.0], [-7.0, -6.0], [3.0, 2.0], [4.0, 5.0]])
    return PairLogps(*columns)


def test_a_users_function_works_through_the_yaml_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses.py").write_text(OWN_LOSS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    config = OmegaConf.create("_target_: my_losses.cautious_loss\n_partial_: true\nbeta: 0.1\n")

    loss = instantiate(config)

    assert declaration_of(loss) == PAIR
    pair = a_pair()
    values = as_loss_values(loss(pair), 2).values
    torch.testing.assert_close(values, dpo_loss(pair, beta=0.1).values)


def test_the_annotation_of_the_first_parameter_says_what_a_users_loss_takes() -> None:
    def ranked(ranked: RankedLogps, *, beta: float) -> LossValues: ...
    def single(single: UnpairedLogps) -> LossValues: ...
    def demonstration(demo: seen_by_type_checkers_only.DemonstrationLogps) -> LossValues: ...
    def anything(batch: Any) -> LossValues: ...

    class Callable_:
        def __call__(self, ranked: RankedLogps) -> LossValues: ...

    assert declaration_of(ranked).takes is RankedLogps
    assert declaration_of(functools.partial(ranked, beta=1.0)).takes is RankedLogps
    assert declaration_of(single).takes is UnpairedLogps
    assert declaration_of(demonstration).takes is DemonstrationLogps
    assert declaration_of(anything).takes is PairLogps
    assert declaration_of(Callable_()).takes is RankedLogps
    # Undeclared, it is an ordinary loss: over pairs or examples, with a reference, one example at a time.
    assert declaration_of(single) == Declaration(UnpairedLogps, "pairs", needs_reference=True, couples_batch=False)


def test_a_users_loss_may_declare_itself() -> None:
    @declare(normaliser="tokens", needs_reference=False, couples_batch=True)
    def mine(pair: PairLogps, *, strength: float) -> LossValues: ...

    expected = Declaration(PairLogps, "tokens", needs_reference=False, couples_batch=True)
    assert declaration_of(functools.partial(mine, strength=1.0)) == expected


def test_declaring_leaves_the_function_itself_as_it_was() -> None:
    assert isinstance(kto_loss, python_types.FunctionType) and kto_loss.__name__ == "kto_loss"


# --- what comes back -------------------------------------------------------------------------------------------------


def test_a_bare_tensor_of_values_is_a_result() -> None:
    values = torch.ones(3, requires_grad=True)
    result = as_loss_values(values, 3)
    assert result.values is values and result.rewards is None and result.parts == {}


def test_rewards_and_parts_are_detached_so_that_logging_keeps_no_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    result = as_loss_values(LossValues(x * 2, (x + 1, x - 1), {"loss/mine": x * 3}), 2)
    assert isinstance(result.rewards, tuple)
    assert result.values.requires_grad
    assert not any(tensor.requires_grad for tensor in (*result.rewards, *result.parts.values()))
    assert as_loss_values(LossValues(x, torch.zeros(2, 4)), 2).rewards is not None


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor(0.7),
        torch.zeros(2),
        torch.zeros(3, 1),
        torch.zeros(3, dtype=torch.long),
        0.7,
        None,
        (torch.zeros(3), torch.zeros(3)),
        LossValues(torch.zeros(3), (torch.zeros(3), torch.zeros(2))),
        LossValues(torch.zeros(3), torch.zeros(2)),
        LossValues(torch.zeros(3), None, {"loss/nll": torch.tensor(1.0)}),
    ],
    ids=["mean", "too few", "column", "integers", "float", "nothing", "tuple", "rewards", "reward", "part"],
)
def test_anything_but_one_value_per_example_is_refused(returned: Any) -> None:
    with pytest.raises(LossInputError):
        as_loss_values(returned, 3)


def test_a_reduced_loss_is_told_why() -> None:
    with pytest.raises(LossInputError, match=r"shape \(\) for 3 examples") as error:
        as_loss_values(torch.tensor(0.7), 3)
    assert error.value.hint and "not their mean" in error.value.hint


def test_log_ratios_of_averages_divide_each_response_by_its_own_tokens() -> None:
    chosen, rejected = pair_log_ratios(a_pair(), average_logps=True)
    torch.testing.assert_close(chosen, torch.tensor([0.5 / 3, 0.0]))
    torch.testing.assert_close(rejected, torch.tensor([-1.0 / 4, 0.0]))
