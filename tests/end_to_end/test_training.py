"""`dpo-train` from data to a final model, as its user sees it."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GenerationConfig

from dpo_cli.policy.tokenizer import load_tokenizer

from .conftest import Workplace, assert_same_weights, echo_pairs, write_jsonl

LN2 = math.log(2)


def test_the_card_counts_what_was_dropped_and_what_was_held_out(workplace: Workplace) -> None:
    rows = [*echo_pairs(24), {"prompt": "echo : w1", "chosen": " w1" * 60, "rejected": " w2"}]
    write_jsonl(workplace.folder / "dropped.jsonl", rows)
    words = ["data.train=dropped.jsonl", "data.eval=null", "data.eval_fraction=0.25", "data.max_tokens=32"]
    done = workplace.train(*words, "run_dir=run", "max_steps=1", "eval_every=0", "save_every=0")
    assert done.returncode == 0, done.stderr
    card = (workplace.folder / "run" / "final" / "README.md").read_text()
    assert "19 training (of 25 rows; dropped: 1 longer than 32 tokens), 5 held out; kind: pair" in card


def test_one_command_makes_a_trained_model_and_says_what_it_gained(workplace: Workplace) -> None:
    done = workplace.train("run_dir=run", "max_steps=40", "eval_every=20", "save_every=20")
    assert done.returncode == 0, done.stderr
    run = workplace.folder / "run"

    evaluations = workplace.metrics("run", "eval")
    assert [row["step"] for row in evaluations] == [0, 20, 40]
    assert evaluations[0]["loss"] == pytest.approx(LN2, abs=1e-5)
    assert evaluations[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert evaluations[-1]["loss"] < 0.5
    assert evaluations[-1]["rewards/accuracies"] > 0.9
    first = workplace.metrics("run", "train")[0]
    expected = {"step", "split", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "entropy",
                "mean_token_accuracy", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                "logps/chosen", "logps/rejected", "perf/tokens_per_second"}  # fmt: skip
    assert expected <= first.keys()

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["loss"]["beta"] == 0.1
    assert config["optimizer"]["lr"] == 3e-3
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000040"]

    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.config._attn_implementation != "packed"
    tokenizer = load_tokenizer(run / "final")
    assert tokenizer("echo : w1")["input_ids"] == [2, 3, 5]
    assert GenerationConfig.from_pretrained(run / "final").eos_token_id == 0
    card = (run / "final" / "README.md").read_text()
    for said in ("pairs.jsonl", "dpo", "beta: 0.1", "rewards/accuracies", "the policy at its start"):
        assert said in card
    assert not [path for path in (run / "final").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    assert "packed and plain forward agree" in done.stdout
    assert "0.693147" in done.stdout


@pytest.mark.parametrize(
    "loss",
    [
        "robust_dpo", "ipo", "hinge", "kto", "simpo", "orpo", "apo_zero", "plackett_luce", "sft_ref",
        "apo_down", "nca_pair", "exo_pair", "sppo_hard", "discopop", "sigmoid_norm", "aot", "aot_unpaired", "bco_pair",
        "cpo", "mix",
    ],
)  # fmt: skip
def test_every_loss_trains_from_the_shell(workplace: Workplace, loss: str) -> None:
    done = workplace.train(f"loss={loss}", "run_dir=run", "max_steps=6", "eval_every=0", "save_every=0")
    assert done.returncode == 0, done.stderr
    first, last = workplace.metrics("run", "eval")
    assert last["loss"] < first["loss"]
    starts = {
        "ipo": 1 / (4 * 0.1**2), "hinge": 1.0, "plackett_luce": LN2, "apo_zero": 1.0, "kto": 0.5, "apo_down": 1.0,
        "nca_pair": 2 * LN2, "exo_pair": -math.log(0.001 * 0.999) / 2 - LN2, "sppo_hard": 50.0,
        "discopop": (1 + LN2) / 2, "sigmoid_norm": LN2, "aot": LN2, "aot_unpaired": LN2, "bco_pair": 2 * LN2,
    }  # fmt: skip
    if loss in starts:
        assert first["loss"] == pytest.approx(starts[loss], rel=1e-5)


def test_a_sweep_over_the_weight_of_tails_shares_what_the_reference_said(workplace: Workplace) -> None:
    brief = ("max_steps=4", "eval_every=0", "save_every=0")
    for alpha, nothing_to_score in ((1.0, 0), (0.25, 2)):
        done = workplace.train(f"loss.ld_alpha={alpha}", f"run_dir=run{alpha}", *brief)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" 0 to score") == nothing_to_score
    whole, weighted = (workplace.metrics(f"run{alpha}", "eval")[0] for alpha in (1.0, 0.25))
    assert weighted["loss"] == pytest.approx(LN2, abs=1e-5)
    assert weighted["logps/chosen"] > whole["logps/chosen"]


def test_sft_shows_both_log_probs_of_held_out_pairs_rising(workplace: Workplace) -> None:
    done = workplace.train("loss=sft_ref", "run_dir=run", "max_steps=20", "eval_every=0")
    assert done.returncode == 0, done.stderr
    first, last = workplace.metrics("run", "eval")
    assert last["logps/chosen"] > first["logps/chosen"]
    assert last["logps/rejected"] > first["logps/rejected"]


def test_dpo_on_the_result_of_sft_starts_at_ln_2_again(workplace: Workplace) -> None:
    assert workplace.train("loss=sft_ref", "run_dir=sft").returncode == 0
    done = workplace.train("model.path=sft/final", "run_dir=dpo")
    assert done.returncode == 0, done.stderr
    assert workplace.metrics("dpo", "eval")[0]["loss"] == pytest.approx(LN2, abs=1e-5)


def test_a_loss_of_ones_own_needs_nothing_but_yaml(workplace: Workplace) -> None:
    (workplace.folder / "my_losses.py").write_text(
        "def squared_margin(pair, *, target):\n"
        "    margin = pair.policy_chosen - pair.policy_rejected - pair.reference_chosen + pair.reference_rejected\n"
        "    return (margin - target) ** 2\n"
    )
    conf = workplace.folder / "my_conf" / "loss"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("_target_: my_losses.squared_margin\n_partial_: true\ntarget: 3.0\n")
    done = workplace.shell(*workplace.defaults, "--config-dir", "my_conf", "loss=mine", "run_dir=run")
    assert done.returncode == 0, done.stderr
    first, *_, last = workplace.metrics("run", "eval")
    assert first["loss"] == pytest.approx(9, abs=1e-3)
    assert last["loss"] < 9


def test_a_sweep_scores_the_reference_once_and_numbers_its_jobs(workplace: Workplace) -> None:
    done = workplace.train("-m", "loss.beta=0.05,0.1,0.5", "run_dir=sweep", "max_steps=3", "sweep.report=false")
    assert done.returncode == 0, done.stderr
    shards = list((workplace.folder / "store" / "reference").glob("*/*.arrow"))
    assert done.stdout.count(" 0 to score") == 4, done.stdout
    assert len(shards) == 2, "one for the training data, one for the held-out data"
    for number, beta in enumerate((0.05, 0.1, 0.5)):
        job = workplace.folder / "sweep" / str(number)
        assert yaml.safe_load((job / "config.yaml").read_text())["loss"]["beta"] == beta
        assert f"loss.beta={beta}" in (job / "overrides.yaml").read_text()
        assert (job / "final" / "model.safetensors").exists()


def test_added_rows_are_the_only_ones_scored(workplace: Workplace) -> None:
    assert workplace.train("run_dir=first").returncode == 0
    write_jsonl(workplace.folder / "pairs.jsonl", [*echo_pairs(96), *echo_pairs(5, seed=9)])
    done = workplace.train("run_dir=second")
    assert done.returncode == 0, done.stderr
    assert "202 responses, 192 kept from an earlier run, 10 to score" in done.stdout


def test_a_short_run_scores_only_the_rows_it_will_see(workplace: Workplace) -> None:
    done = workplace.train("run_dir=run", "max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "reference: 64 responses, 0 kept from an earlier run, 64 to score" in done.stdout


def test_a_warm_and_a_cold_store_give_the_same_run(workplace: Workplace) -> None:
    assert workplace.train("run_dir=cold").returncode == 0
    warm = workplace.train("run_dir=warm")
    assert " 0 to score" in warm.stdout
    assert workplace.train("run_dir=elsewhere", "store_dir=another_store").returncode == 0
    assert_same_weights(workplace.final_weights("cold"), workplace.final_weights("warm"))
    assert_same_weights(workplace.final_weights("cold"), workplace.final_weights("elsewhere"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.dtype=bfloat16"],
        ["model.gradient_checkpointing=true"],
        ["model.lora.rank=4"],
        ["model.lora.rank=4", "model.dtype=bfloat16", "model.gradient_checkpointing=true"],
        ["optimizer=rmsprop", "optimizer.lr=1e-3"],
        ["data.token_weights=2.0"],
        ["loss.nll_alpha=1.0", "loss.average_logps=true", "loss.label_smoothing=0.1"],
        ["loss.reference_free=true"],
        ["deterministic=true", "logger=[]"],
    ],
)
def test_what_users_combine_works(workplace: Workplace, overrides: list[str]) -> None:
    done = workplace.train(*overrides, "run_dir=run", "max_steps=8", "eval_every=0")
    assert done.returncode == 0, done.stderr
    first, last = workplace.metrics("run", "eval")
    assert last["rewards/margins"] > first["rewards/margins"]
    model = AutoModelForCausalLM.from_pretrained(workplace.folder / "run" / "final")
    expected = torch.bfloat16 if "model.dtype=bfloat16" in overrides else torch.float32
    assert model.dtype == expected


def test_gradient_checkpointing_changes_nothing_but_memory(workplace: Workplace) -> None:
    assert workplace.train("run_dir=plain").returncode == 0
    assert workplace.train("run_dir=saving", "model.gradient_checkpointing=true").returncode == 0
    plain, saving = workplace.final_weights("plain"), workplace.final_weights("saving")
    for name, tensor in plain.items():
        torch.testing.assert_close(saving[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_token_budget_changes_nothing_but_memory(workplace: Workplace) -> None:
    assert workplace.train("run_dir=small", "tokens_per_microbatch=64").returncode == 0
    assert workplace.train("run_dir=large", "tokens_per_microbatch=4096").returncode == 0
    small, large = workplace.metrics("small", "eval"), workplace.metrics("large", "eval")
    for one, other in zip(small, large, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_log_probs_that_came_with_the_data_are_used_and_checked(workplace: Workplace) -> None:
    assert workplace.train("run_dir=scored", "max_steps=6").returncode == 0
    from dpo_cli.reference.sums import ReferenceSums

    def with_columns(name: str, rows: list[dict[str, str]], shift: float) -> None:
        sums = ReferenceSums.load(workplace.folder / "scored" / f"reference_{name}.safetensors")
        brought = [
            {**row, "ref_chosen_logps": float(sums.of(i)[0]) + shift, "ref_rejected_logps": float(sums.of(i)[1])}
            for i, row in enumerate(rows)
        ]
        write_jsonl(workplace.folder / f"{name}.jsonl", brought)

    files = ["data.train=train.jsonl", "data.eval=eval.jsonl"]
    with_columns("train", echo_pairs(96), 0.0)
    with_columns("eval", echo_pairs(32, seed=1), 0.0)
    done = workplace.train(*files, "run_dir=brought", "max_steps=6")
    assert done.returncode == 0, done.stderr
    assert "192 came with the data" in done.stdout
    for name, tensor in workplace.final_weights("scored").items():
        torch.testing.assert_close(workplace.final_weights("brought")[name], tensor, rtol=1e-4, atol=1e-5)

    with_columns("train", echo_pairs(96), -15.0)
    wrong = workplace.train(*files, "run_dir=wrong")
    assert wrong.returncode == 2
    assert "do not agree" in wrong.stderr
    assert "train.jsonl" in wrong.stderr


def test_task_accuracy_is_measured_before_during_and_after_on_the_same_problems(workplace: Workplace) -> None:
    write_jsonl(workplace.folder / "problems.jsonl", [{"prompt": f"echo : w{n}", "answer": str(n)} for n in range(8)])
    task = ["eval.task.problems=problems.jsonl", "eval.task.max_new_tokens=4", "eval.task.verifier=checks.even"]
    # About half of all texts have it, whatever the policy has learnt.
    (workplace.folder / "checks.py").write_text(
        "def even(response: str, truth: str) -> bool:\n    return sum(map(ord, response)) % 2 == 0\n"
    )
    done = workplace.shell(*workplace.defaults, *task, "eval.task.during=6", "max_steps=24", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "task accuracy on 8 held-out problems" in done.stdout
    kept = json.loads((workplace.folder / "run" / "task.json").read_text())
    assert len(kept["before"]) == len(kept["after"]) == 8
    evaluations = workplace.metrics("run", "eval")
    assert [row["step"] for row in evaluations] == [0, 6, 12, 18, 24]
    assert evaluations[0]["task/accuracy"] == sum(kept["before"][:6]) / 6
    assert evaluations[-1]["task/accuracy"] == sum(kept["after"][:6]) / 6
    assert {*kept["before"], *kept["after"]} == {0, 1}


def test_a_task_is_evaluated_without_held_out_pairs_and_moves_no_weight(workplace: Workplace) -> None:
    write_jsonl(workplace.folder / "problems.jsonl", [{"prompt": f"echo : w{n}", "answer": str(n)} for n in range(8)])
    alone = ["data.eval=null", "data.eval_fraction=0"]
    task = ["eval.task.problems=problems.jsonl", "eval.task.max_new_tokens=4"]
    assert workplace.train(*alone, "run_dir=without").returncode == 0
    assert workplace.metrics("without", "eval") == []
    assert workplace.train(*alone, *task, "run_dir=with").returncode == 0
    evaluations = workplace.metrics("with", "eval")
    assert [(row["step"], row["task/accuracy"]) for row in evaluations] == [(0, 0.0), (6, 0.0), (12, 0.0)]
    assert_same_weights(workplace.final_weights("without"), workplace.final_weights("with"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows(workplace: Workplace) -> None:
    done = workplace.train("run_dir=run", "optimizer.lr=1e30", "optimizer.max_grad_norm=null")
    assert done.returncode == 3
    assert "not finite" in done.stderr
    assert "pairs.jsonl row" in done.stderr
    assert "Traceback" not in done.stderr


def test_tensorboard_shows_the_same_metrics(workplace: Workplace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert workplace.train("run_dir=run", "logger=[tensorboard]").returncode == 0
    (events,) = (workplace.folder / "run").rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events))
    shown.Reload()
    (last,) = [row for row in workplace.metrics("run", "eval") if row["step"] == 12]
    scalar = shown.Scalars("eval/rewards/margins")[-1]
    assert (scalar.step, scalar.value) == (12, pytest.approx(last["rewards/margins"], rel=1e-5))
    assert [event.step for event in shown.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
