"""Our losses and their gradients equal what TRL's own trainers compute on the same model and tokens, in float32.

TRL's side is the real trainer: its data preparation, its collator, its forward over padded rows, its reference model,
its reduction. Ours is a plain log-softmax over each unpadded sequence, our loss function, and the declared normaliser.
Where the two reduce differently, the test says so and compares under TRL's reduction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo_cli.data.example import Example
from dpo_cli.data.tail_weights import TailWeighted
from dpo_cli.losses.aot import aot_loss
from dpo_cli.losses.aot_unpaired import aot_unpaired_loss
from dpo_cli.losses.apo_down import apo_down_loss
from dpo_cli.losses.apo_zero import apo_zero_loss
from dpo_cli.losses.bco_pair import bco_pair_loss
from dpo_cli.losses.cpo import cpo_loss
from dpo_cli.losses.discopop import discopop_loss
from dpo_cli.losses.dpo import dpo_loss
from dpo_cli.losses.exo_pair import exo_pair_loss
from dpo_cli.losses.hinge import hinge_loss
from dpo_cli.losses.ipo import ipo_loss
from dpo_cli.losses.kto import kto_loss
from dpo_cli.losses.mix import mix_loss
from dpo_cli.losses.nca_pair import nca_pair_loss
from dpo_cli.losses.orpo import orpo_loss
from dpo_cli.losses.robust_dpo import robust_dpo_loss
from dpo_cli.losses.sft_ref import sft_ref_loss
from dpo_cli.losses.sigmoid_norm import sigmoid_norm_loss
from dpo_cli.losses.simpo import simpo_loss
from dpo_cli.losses.sppo_hard import sppo_hard_loss
from dpo_cli.losses.types import (
    DemonstrationLogps,
    LossValues,
    PairLogps,
    UnpairedLogps,
    declaration_of,
)

pytest.importorskip("trl", reason="TRL is a development dependency: pip install trl")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

# TRL announces on import that these trainers are experimental.
pytestmark = pytest.mark.filterwarnings("ignore")

Row = dict[str, Any]
WORDS = 40
SIDES = ("chosen", "rejected")
ROWS: list[Row] = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6 w7", "rejected": " w8"},
    {"prompt": "w9", "chosen": " w10", "rejected": " w11 w12 w13 w14 w15 w16"},
    {"prompt": "w17 w18 w19 w20 w21", "chosen": " w22 w23", "rejected": " w22 w24"},
]


# --- a tiny model and its tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def qwen2(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=WORDS + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        # Much above the usual 0.02, or every distribution would be uniform and every margin close to zero.
        initializer_range=0.3,
    )
    return transformers.Qwen2ForCausalLM(config).float()


@pytest.fixture
def policy() -> Any:
    return qwen2(seed=1)


@pytest.fixture
def reference() -> Any:
    return qwen2(seed=2)


def training_arguments(config: Any, folder: Path, **settings: Any) -> Any:
    return config(
        output_dir=str(folder),
        per_device_train_batch_size=len(ROWS),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )


# --- our side: one sequence at a time --------------------------------------------------------------------------------


def response_logps(model: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
    """(n,) summed log-probs of each response after its prompt."""
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        predicted = logits[len(prompt) - 1 : -1]
        sums.append(predicted[torch.arange(len(response)), torch.tensor(response)].sum())
    return torch.stack(sums)


@torch.no_grad()
def log_sums_of_squared_probs(model: Any, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
    """(n,) of each response, the sum over its tokens of log(sum of squared probabilities)."""
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(torch.logsumexp(2 * logps, -1).sum())
    return torch.stack(sums)


def weighted_sums(model: Any, example: Example) -> Tensor:
    """(responses,) of one example, with its token weights."""
    sums = []
    for response, weights in zip(example.responses, example.weights or (), strict=True):
        ids = torch.tensor([*example.prompt.tolist(), *response.tolist()])
        logps = model(ids[None]).logits[0].log_softmax(-1)[len(example.prompt) - 1 : -1]
        sums.append(
            (logps[torch.arange(len(response)), torch.from_numpy(response).long()] * torch.tensor(weights)).sum()
        )
    return torch.stack(sums)


class Listed(list[Example]):
    @property
    def sizes(self) -> Any:
        return np.array([example.packed_tokens for example in self], dtype=np.int32)


def lengths(responses: Sequence[list[int]]) -> Tensor:
    return torch.tensor([float(len(response)) for response in responses])


def pair_logps(rows: Sequence[Row], policy: Any, reference: Any | None) -> PairLogps:
    prompts, chosen, rejected = ([row[key] for row in rows] for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    with torch.no_grad():
        ours = None if reference is None else response_logps(reference, prompts, chosen)
        other = None if reference is None else response_logps(reference, prompts, rejected)
    return PairLogps(
        policy_chosen=response_logps(policy, prompts, chosen),
        policy_rejected=response_logps(policy, prompts, rejected),
        reference_chosen=ours,
        reference_rejected=other,
        chosen_tokens=lengths(chosen),
        rejected_tokens=lengths(rejected),
    )


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_loss_and_gradients(ours: tuple[Any, Tensor], theirs: tuple[Any, Tensor]) -> None:
    (our_model, our_loss), (their_model, their_loss) = ours, theirs
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    our_gradients, their_gradients = gradients(our_model, our_loss), gradients(their_model, their_loss)
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    assert largest > 0.1, "equality of gradients that vanish would mean nothing"
    for name, expected in their_gradients.items():
        torch.testing.assert_close(
            our_gradients[name], expected, rtol=0, atol=1e-5 * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


# --- DPOTrainer ------------------------------------------------------------------------------------------------------


def dpo_trainer(folder: Path, tokenizer: Any, policy: Any, reference: Any, rows: list[Row], **settings: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=training_arguments(DPOConfig, folder, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def trl_loss(trainer: Any, rows: Sequence[Row] | None = None) -> tuple[Any, Tensor]:
    rows = list(trainer.train_dataset) if rows is None else rows
    return trainer.model, trainer.compute_loss(trainer.model, trainer.data_collator(list(rows)))


def reduced(result: LossValues) -> Tensor:
    """By the normaliser of our preference losses: the mean over pairs."""
    return result.values.mean()


DPO_TRAINER_LOSSES: dict[str, tuple[Callable[[PairLogps], LossValues], dict[str, Any]]] = {
    "dpo": (partial(dpo_loss, beta=0.3), {"loss_type": "sigmoid", "beta": 0.3}),
    "dpo of averages": (
        partial(dpo_loss, beta=2.0, average_logps=True),
        {"loss_type": "sigmoid_norm", "beta": 2.0},
    ),
    "dpo, forward_kl": (
        partial(dpo_loss, beta=0.3, f_divergence="forward_kl"),
        {"loss_type": "sigmoid", "beta": 0.3, "f_divergence_type": "forward_kl"},
    ),
    "dpo, js_divergence": (
        partial(dpo_loss, beta=0.3, f_divergence="js_divergence"),
        {"loss_type": "sigmoid", "beta": 0.3, "f_divergence_type": "js_divergence"},
    ),
    "dpo, alpha_divergence": (
        partial(dpo_loss, beta=0.3, f_divergence="alpha_divergence", f_alpha=0.7),
        {
            "loss_type": "sigmoid",
            "beta": 0.3,
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.7,
        },
    ),
    "dpo of averages, js_divergence": (
        partial(dpo_loss, beta=2.0, average_logps=True, f_divergence="js_divergence"),
        {"loss_type": "sigmoid_norm", "beta": 2.0, "f_divergence_type": "js_divergence"},
    ),
    "robust_dpo": (
        partial(robust_dpo_loss, beta=0.3, label_smoothing=0.2),
        {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.2},
    ),
    "ipo": (partial(ipo_loss, beta=0.3), {"loss_type": "ipo", "beta": 0.3}),
    "hinge": (partial(hinge_loss, beta=0.1), {"loss_type": "hinge", "beta": 0.1}),
    "apo_zero": (partial(apo_zero_loss, beta=0.3), {"loss_type": "apo_zero", "beta": 0.3}),
    "apo_down": (partial(apo_down_loss, beta=0.3), {"loss_type": "apo_down", "beta": 0.3}),
    "exo_pair": (
        partial(exo_pair_loss, beta=0.3, label_smoothing=0.01),
        {"loss_type": "exo_pair", "beta": 0.3, "label_smoothing": 0.01},
    ),
    "nca_pair": (partial(nca_pair_loss, beta=0.3), {"loss_type": "nca_pair", "beta": 0.3}),
    "sppo_hard": (partial(sppo_hard_loss, beta=0.3), {"loss_type": "sppo_hard", "beta": 0.3}),
    "discopop": (
        partial(discopop_loss, beta=0.3, tau=0.2),
        {"loss_type": "discopop", "beta": 0.3, "discopop_tau": 0.2},
    ),
    "sigmoid_norm": (partial(sigmoid_norm_loss, beta=2.0), {"loss_type": "sigmoid_norm", "beta": 2.0}),
    "bco_pair, unshifted": (
        partial(bco_pair_loss, beta=0.3, reward_shift="none"),
        {"loss_type": "bco_pair", "beta": 0.3},
    ),
    "mix": (
        partial(
            mix_loss,
            beta=0.3,
            losses=[
                {"loss": "dpo", "weight": 0.8},
                {"loss": "bco_pair", "weight": 0.2, "reward_shift": "none"},
                {"loss": "aot", "weight": 0.5},
                {"loss": "discopop", "weight": 0.1, "tau": 0.2},
            ],
        ),
        {
            "loss_type": ["sigmoid", "bco_pair", "aot", "discopop"],
            "loss_weights": [0.8, 0.2, 0.5, 0.1],
            "beta": 0.3,
            "discopop_tau": 0.2,
        },
    ),
    "aot": (
        partial(aot_loss, beta=0.3, label_smoothing=0.1),
        {"loss_type": "aot", "beta": 0.3, "label_smoothing": 0.1},
    ),
    "aot_unpaired": (
        partial(aot_unpaired_loss, beta=0.3, label_smoothing=0.1),
        {"loss_type": "aot_unpaired", "beta": 0.3, "label_smoothing": 0.1},
    ),
}


@pytest.mark.parametrize("name", DPO_TRAINER_LOSSES)
def test_losses_of_dpo_trainer(name: str, tmp_path: Path, tokenizer: Any, policy: Any, reference: Any) -> None:
    loss, settings = DPO_TRAINER_LOSSES[name]
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, **settings)
    pair = pair_logps(list(trainer.train_dataset), policy, reference)
    assert_same_loss_and_gradients((policy, reduced(loss(pair))), trl_loss(trainer))


@pytest.mark.parametrize("averaged", [False, True])
def test_wpo_weights_are_trls(averaged: bool, tmp_path: Path, tokenizer: Any, policy: Any, reference: Any) -> None:
    beta, loss_type = (2.0, "sigmoid_norm") if averaged else (0.3, "sigmoid")
    settings = {"loss_type": loss_type, "beta": beta, "use_weighting": True}
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, **settings)
    rows = list(trainer.train_dataset)
    pair = pair_logps(rows, policy, reference)
    sums = [
        log_sums_of_squared_probs(policy, [row["prompt_ids"] for row in rows], [row[f"{side}_ids"] for row in rows])
        for side in ("chosen", "rejected")
    ]
    pair = replace(pair, statistics={"log_sum_squared_probs": torch.stack(sums, dim=1)})
    loss = reduced(dpo_loss(pair, beta=beta, average_logps=averaged, use_weighting=True))
    model, theirs = trl_loss(trainer)
    # Responses so unlikely have small weights. Multiplied by as much, equality means as much as elsewhere.
    scale = 1 / loss.item()
    plain = reduced(dpo_loss(pair, beta=beta, average_logps=averaged))
    assert abs(loss - plain) > 0.1, "the weights must count"
    assert_same_loss_and_gradients((policy, scale * loss), (model, scale * theirs))


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_ld_dpo_is_trls(alpha: float, tmp_path: Path, tokenizer: Any, policy: Any, reference: Any) -> None:
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, loss_type="sigmoid", beta=0.3, ld_alpha=alpha)
    rows = list(trainer.train_dataset)
    loss = partial(dpo_loss, beta=0.3, ld_alpha=alpha)
    examples = [
        Example(np.array(row["prompt_ids"], np.int32), tuple(np.array(row[f"{s}_ids"], np.int32) for s in SIDES))
        for row in rows
    ]
    # As the data come to the loss: every sum with the weights that the wrapper gives.
    weighted = TailWeighted(Listed(examples), declaration_of(loss).tail_weight)
    policies, references = (
        torch.stack([weighted_sums(model, weighted[number]) for number in range(len(rows))])
        for model in (policy, reference)
    )
    tokens = torch.tensor([[float(each.sum()) for each in weighted[n].weights or ()] for n in range(len(rows))])
    pair = PairLogps(*policies.T, *references.detach().T, *tokens.T)
    plain = reduced(dpo_loss(pair_logps(rows, policy, reference), beta=0.3))
    assert (reduced(loss(pair)) - plain).abs() > 1e-2, "the tails must count"
    assert_same_loss_and_gradients((policy, reduced(loss(pair))), trl_loss(trainer))


def test_conservative_dpo_is_trls_aot_of_one_pair_at_a_time(
    tmp_path: Path, tokenizer: Any, policy: Any, reference: Any
) -> None:
    # TRL's `sigmoid` no longer smooths labels. Its `aot` does, over sorted margins; a single pair has nothing to sort.
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, loss_type="aot", beta=0.3, label_smoothing=0.1)
    rows = list(trainer.train_dataset)
    theirs = torch.stack([trl_loss(trainer, [row])[1] for row in rows]).mean()
    ours = reduced(dpo_loss(pair_logps(rows, policy, reference), beta=0.3, label_smoothing=0.1))
    assert_same_loss_and_gradients((policy, ours), (trainer.model, theirs))


def test_sft_ref_is_trls_sft_term(tmp_path: Path, tokenizer: Any, policy: Any, reference: Any) -> None:
    # A mean over the tokens of the batch in both: here by the declared normaliser.
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, loss_type="sft")
    pair = pair_logps(list(trainer.train_dataset), policy, None)
    assert declaration_of(sft_ref_loss).normaliser == "tokens"
    demo = DemonstrationLogps(pair.policy_chosen, pair.chosen_tokens)
    ours = sft_ref_loss(demo).values.sum() / demo.tokens.sum()
    assert_same_loss_and_gradients((policy, ours), trl_loss(trainer))


def test_nll_alpha_is_trls_mix_of_sigmoid_and_sft_where_the_two_reduce_alike(
    tmp_path: Path, tokenizer: Any, policy: Any, reference: Any
) -> None:
    # TRL's sft term is a mean over the tokens of the batch, ours of each response first. One pair at a time they agree.
    mix = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.3}
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, **mix)
    rows = list(trainer.train_dataset)
    pair = pair_logps(rows, policy, reference)
    ours = reduced(dpo_loss(pair, beta=0.3, nll_alpha=0.7))
    one_by_one = torch.stack([trl_loss(trainer, [row])[1] for row in rows]).mean()
    # In a batch of unequal lengths they do not: the documented deviation.
    assert (ours - trl_loss(trainer)[1]).abs() > 1e-3
    assert_same_loss_and_gradients((policy, ours), (trainer.model, one_by_one))


def test_mpo_is_trls_one_pair_at_a_time(tmp_path: Path, tokenizer: Any, policy: Any, reference: Any) -> None:
    # In a batch the sft terms differ, as for nll_alpha above.
    mix = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3}
    trainer = dpo_trainer(tmp_path, tokenizer, policy, reference, ROWS, **mix)
    rows = list(trainer.train_dataset)
    bco = {"loss": "bco_pair", "weight": 0.2, "reward_shift": "none"}
    losses = [{"loss": "dpo", "weight": 0.8}, bco, {"loss": "sft_ref", "weight": 1.0}]
    ours = reduced(mix_loss(pair_logps(rows, policy, reference), beta=0.3, losses=losses))
    one_by_one = torch.stack([trl_loss(trainer, [row])[1] for row in rows]).mean()
    assert_same_loss_and_gradients((policy, ours), (trainer.model, one_by_one))


# --- KTOTrainer ------------------------------------------------------------------------------------------------------


def test_kto_is_trls_given_the_same_mismatched_completions(
    tmp_path: Path, tokenizer: Any, policy: Any, reference: Any
) -> None:
    # TRL gives each row the completion of its neighbour in the batch; ours comes with the data. Same pairs here.
    from trl import KTOConfig, KTOTrainer

    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(ROWS, ("chosen", "rejected", "chosen"), strict=True)
    ]
    trainer = KTOTrainer(
        model=copy.deepcopy(policy),
        ref_model=copy.deepcopy(reference),
        args=training_arguments(KTOConfig, tmp_path, beta=0.3, **weights),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    tokenised = list(trainer.train_dataset)
    prompts, responses, mismatched = (
        [row[key] for row in tokenised] for key in ("prompt_ids", "completion_ids", "KL_completion_ids")
    )
    with torch.no_grad():
        kl_policy = response_logps(policy, prompts, mismatched)
        kl_reference = response_logps(reference, prompts, mismatched)
        reference_logps = response_logps(reference, prompts, responses)
    assert (kl_policy - kl_reference).mean() > 0.01, "the divergence must count, or this compares too little"
    unpaired = UnpairedLogps(
        policy=response_logps(policy, prompts, responses),
        reference=reference_logps,
        tokens=lengths(responses),
        desirable=torch.tensor([row["label"] for row in tokenised]),
        kl_policy=kl_policy,
        kl_reference=kl_reference,
    )
    assert_same_loss_and_gradients((policy, reduced(kto_loss(unpaired, beta=0.3, **weights))), trl_loss(trainer))


# --- CPOTrainer and ORPOTrainer: no reference ------------------------------------------------------------------------


def collated(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The batch that these trainers take, right-padded, from token ids: their own tokenisation wants a BOS token."""
    batch = {}
    for side in ("chosen", "rejected"):
        sequences = [row["prompt_ids"] + row[f"{side}_ids"] for row in rows]
        width = max(map(len, sequences))
        padding = [width - len(ids) for ids in sequences]
        masked = [[-100] * len(row["prompt_ids"]) + row[f"{side}_ids"] for row in rows]
        batch[f"{side}_input_ids"] = torch.tensor([s + [0] * p for s, p in zip(sequences, padding, strict=True)])
        batch[f"{side}_attention_mask"] = torch.tensor(
            [[1] * len(s) + [0] * p for s, p in zip(sequences, padding, strict=True)]
        )
        batch[f"{side}_labels"] = torch.tensor([m + [-100] * p for m, p in zip(masked, padding, strict=True)])
    return batch


TOKEN_ROWS: list[Row] = [
    {"prompt_ids": [4, 5, 6], "chosen_ids": [7, 8, 9, 1], "rejected_ids": [10, 1]},
    {"prompt_ids": [11], "chosen_ids": [12, 1], "rejected_ids": [13, 14, 15, 16, 17, 1]},
    {"prompt_ids": [18, 19, 20, 21], "chosen_ids": [22, 23, 1], "rejected_ids": [22, 24, 1]},
]


def reference_free_trainer(folder: Path, tokenizer: Any, policy: Any, kind: str, **settings: Any) -> Any:
    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    bos_tokenizer = copy.deepcopy(tokenizer)
    bos_tokenizer.bos_token = "<eos>"
    return Trainer(
        model=copy.deepcopy(policy),
        args=training_arguments(Config, folder, max_length=32, **settings),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=bos_tokenizer,
    )


CPO_TRAINER_LOSSES: dict[str, tuple[Callable[[PairLogps], LossValues], dict[str, Any]]] = {
    "simpo": (partial(simpo_loss, beta=2.0, gamma=0.8), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8}),
    "cpo without imitation": (partial(cpo_loss, beta=0.2, nll_alpha=0.0), {"loss_type": "sigmoid", "beta": 0.2}),
    "dpo, reference-free": (
        partial(dpo_loss, beta=0.2, reference_free=True),
        {"loss_type": "sigmoid", "beta": 0.2},
    ),
    "dpo, reference-free and smoothed": (
        partial(dpo_loss, beta=0.2, reference_free=True, label_smoothing=0.15),
        {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.15},
    ),
}


@pytest.mark.parametrize("name", CPO_TRAINER_LOSSES)
def test_reference_free_losses_of_cpo_trainer(name: str, tmp_path: Path, tokenizer: Any, policy: Any) -> None:
    loss, settings = CPO_TRAINER_LOSSES[name]
    trainer = reference_free_trainer(tmp_path, tokenizer, policy, "cpo", cpo_alpha=0.0, **settings)
    ours = reduced(loss(pair_logps(TOKEN_ROWS, policy, None)))
    theirs = trainer.compute_loss(trainer.model, collated(TOKEN_ROWS))
    assert_same_loss_and_gradients((policy, ours), (trainer.model, theirs))


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (partial(cpo_loss, beta=0.2, nll_alpha=0.6), {"loss_type": "sigmoid", "beta": 0.2}),
        (
            partial(cpo_loss, beta=0.2, nll_alpha=0.6, label_smoothing=0.1),
            {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.1},
        ),
        (
            partial(simpo_loss, beta=2.0, gamma=0.8, nll_alpha=0.6),
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8},
        ),
    ],
    ids=["cpo", "cpo, smoothed", "cpo-simpo"],
)
def test_cpo_is_trls_one_pair_at_a_time(
    loss: Callable[[PairLogps], LossValues], settings: dict[str, Any], tmp_path: Path, tokenizer: Any, policy: Any
) -> None:
    # TRL's NLL is a mean over the tokens of the batch, ours of each response first.
    trainer = reference_free_trainer(tmp_path, tokenizer, policy, "cpo", cpo_alpha=0.6, **settings)
    theirs = torch.stack([trainer.compute_loss(trainer.model, collated([row])) for row in TOKEN_ROWS]).mean()
    ours = reduced(loss(pair_logps(TOKEN_ROWS, policy, None)))
    assert (ours - trainer.compute_loss(trainer.model, collated(TOKEN_ROWS))).abs() > 1e-3, "the documented deviation"
    assert_same_loss_and_gradients((policy, ours), (trainer.model, theirs))


def test_the_odds_term_of_orpo_is_trls(tmp_path: Path, tokenizer: Any, policy: Any) -> None:
    # The difference of two values of beta leaves the odds term alone, which both average over pairs.
    trainer = reference_free_trainer(tmp_path, tokenizer, policy, "orpo", beta=0.0)
    batch = collated(TOKEN_ROWS)
    without = trainer.compute_loss(trainer.model, batch)
    trainer.beta = 1.5
    theirs = trainer.compute_loss(trainer.model, batch) - without
    pair = pair_logps(TOKEN_ROWS, policy, None)
    ours = reduced(orpo_loss(pair, beta=1.5)) - reduced(orpo_loss(pair, beta=0.0))
    assert_same_loss_and_gradients((policy, ours), (trainer.model, theirs))


def test_all_of_orpo_is_trls_where_the_prompt_has_nothing_to_score(tmp_path: Path, tokenizer: Any, policy: Any) -> None:
    # TRL's NLL covers the prompt too, as a mean over the batch's tokens; ours is each response's own mean. With
    # prompts of one token (which nothing predicts), one pair at a time, both score the same tokens alike.
    trainer = reference_free_trainer(tmp_path, tokenizer, policy, "orpo", beta=0.7)
    rows = [row | {"prompt_ids": row["prompt_ids"][:1]} for row in TOKEN_ROWS]
    theirs = torch.stack([trainer.compute_loss(trainer.model, collated([row])) for row in rows]).mean()
    ours = reduced(orpo_loss(pair_logps(rows, policy, None), beta=0.7))
    # With longer prompts the two differ: the documented deviation.
    longer = trainer.compute_loss(trainer.model, collated(TOKEN_ROWS))
    assert (longer - reduced(orpo_loss(pair_logps(TOKEN_ROWS, policy, None), beta=0.7))).abs() > 1e-2
    assert_same_loss_and_gradients((policy, ours), (trainer.model, theirs))
