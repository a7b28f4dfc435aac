"""Real questions, solutions, conversations and the real tokenizer; only the weights are random."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from .conftest import DPO_TRAIN, Workplace, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

LN2 = math.log(2)
TIMEOUT = 3000.0
SOLUTIONS = "gsm8k/example_model_solutions.jsonl"


def gsm8k_pairs(real_data: Path) -> list[dict[str, Any]]:
    """Chosen: the ground truth and every solution marked right; rejected: every solution marked wrong."""
    rows = []
    for line in (real_data / SOLUTIONS).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        graded = [value for value in entry.values() if isinstance(value, dict)]
        right = [entry["ground_truth"], *(solution["solution"] for solution in graded if solution["is_correct"])]
        wrong = [solution["solution"] for solution in graded if not solution["is_correct"]]
        for number, rejected in enumerate(wrong):
            chosen = right[number % len(right)]
            rows.append({"prompt": entry["question"] + "\n", "chosen": chosen, "rejected": rejected})
    return rows


def random_model(folder: Path, tokenizer_folder: Path, *, hidden: int = 64) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    size = max(tokenizer.get_vocab().values()) + 1
    config = Qwen2Config(
        vocab_size=size, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_tokenizer(folder: Path, real_data: Path, texts: Iterator[str], size: int = 2048) -> Path:
    """The real tokenizer's own algorithm, trained anew on the text at hand."""
    AutoTokenizer.from_pretrained(real_data / "qwen2-tokenizer").train_new_from_iterator(texts, size).save_pretrained(
        folder
    )
    return folder


def sft_then_dpo(
    workplace: Workplace, model: Path, *settings: str, sft: tuple[str, ...] = (), dpo: tuple[str, ...] = ()
) -> None:
    """sft_ref makes a reference that fits the data; DPO starts from it at ln 2 and learns to prefer."""
    common = ["model=local", "data=local", "hardware.device=cpu", *settings]
    words = [*common, f"model.path={model}", "loss=sft_ref", "run_dir=sft", "optimizer.lr=3e-3", *sft]
    done = workplace.shell(*words, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    first, *_, last = workplace.metrics("sft", "eval")
    assert last["loss"] < first["loss"] - 1
    assert last["logps/chosen"] > first["logps/chosen"]
    assert last["logps/rejected"] > first["logps/rejected"]

    words = [*common, "model.path=sft/final", "run_dir=dpo", "optimizer.lr=5e-4", "loss.beta=0.1", *dpo]
    done = workplace.shell(*words, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    first, *_, last = workplace.metrics("dpo", "eval")
    assert first["loss"] == pytest.approx(LN2, abs=1e-5)
    assert last["loss"] < first["loss"]
    assert last["rewards/accuracies"] > max(0.55, first["rewards/accuracies"] + 0.05)
    taught = [row["logps/chosen"] for row in workplace.metrics("sft", "eval")]
    print(
        f"\n{model.name}: sft_ref held-out logps/chosen {taught[0]:.1f} -> {taught[-1]:.1f}; dpo held-out loss "
        f"{first['loss']:.6f} -> {last['loss']:.4f}, reward accuracy {first['rewards/accuracies']:.1%} -> "
        f"{last['rewards/accuracies']:.1%}"
    )


def test_all_gsm8k_pairs_with_a_tokenizer_trained_on_their_text(tmp_path: Path, real_data: Path) -> None:
    rows = gsm8k_pairs(real_data)
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    texts = (row[key] for row in rows for key in ("prompt", "chosen", "rejected"))
    model = random_model(tmp_path / "small-tokenizer", small_tokenizer(tmp_path / "tokenizer", real_data, texts))
    sft_then_dpo(
        Workplace(tmp_path, threads=2), model,
        "data.train=pairs.jsonl", "data.eval_fraction=0.1", "data.max_tokens=512",
        "tokens_per_microbatch=8192", "global_pairs=32", "epochs=2", "eval_every=0", "save_every=0",
    )  # fmt: skip


def test_gsm8k_pairs_with_the_real_tokenizer(tmp_path: Path, real_data: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", gsm8k_pairs(real_data)[:360])
    model = random_model(tmp_path / "real-tokenizer", real_data / "qwen2-tokenizer", hidden=32)
    sft_then_dpo(
        Workplace(tmp_path, threads=2), model,
        "data.train=pairs.jsonl", "data.eval_fraction=0.15", "data.max_tokens=512",
        "tokens_per_microbatch=8192", "global_pairs=16", "epochs=2", "eval_every=0", "save_every=0",
    )  # fmt: skip


def test_gsm8k_pairs_on_two_ranks_of_zero3_then_one(tmp_path: Path, real_data: Path) -> None:
    """Weights partitioned over two processes; the second half of DPO by one; the result opens as any model does."""
    rows = gsm8k_pairs(real_data)[:1200]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    texts = (row[key] for row in rows for key in ("prompt", "chosen", "rejected"))
    model = random_model(tmp_path / "small-tokenizer", small_tokenizer(tmp_path / "tokenizer", real_data, texts))
    workplace = Workplace(tmp_path)
    settings = [
        "data.train=pairs.jsonl", "data.eval_fraction=0.1", "data.max_tokens=512", "tokens_per_microbatch=8192",
        "global_pairs=32", "epochs=2", "eval_every=0", "save_every=20", "hardware=deepspeed_zero3",
        "hardware.num_workers=2",
    ]  # fmt: skip
    sft_then_dpo(workplace, model, *settings)
    before = workplace.metrics("dpo", "eval")[-1]
    shutil.rmtree(tmp_path / "dpo" / "final")
    newest = sorted((tmp_path / "dpo" / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    resumed = workplace.shell("resume=dpo", "hardware.num_workers=1", timeout=1800)
    assert resumed.returncode == 0, resumed.stderr
    after = workplace.metrics("dpo", "eval")[-1]
    assert after["step"] == before["step"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "dpo" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dpo" / "final")
    text = tokenizer.decode(
        exported.generate(**tokenizer(rows[0]["prompt"], return_tensors="pt"), max_new_tokens=20, do_sample=False)[0]
    )
    assert text.startswith(rows[0]["prompt"][:40])


def test_the_published_pdpo_experiment_from_its_own_recipe_at_a_tiny_scale(tmp_path: Path, real_data: Path) -> None:
    """GSM8K's own rows through sft_ref, dpo-sample, the recipe on two ranks of ZeRO-3, and dpo-eval."""
    rows = (real_data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in (("taught", rows[:1500]), ("discriminator", rows[1500:1740]), ("generator", rows[1740:1800])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    texts = (text for row in map(json.loads, rows) for text in (row["question"], row["answer"]))
    model = random_model(tmp_path / "model", small_tokenizer(tmp_path / "tokenizer", real_data, texts, size=1024))
    workplace = Workplace(tmp_path)

    def called(command: str, *words: str) -> str:
        done = subprocess.run(
            [Path(DPO_TRAIN).with_name(command), *words], cwd=tmp_path, env=workplace.environment, timeout=TIMEOUT,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    called(
        "dpo-train", "model=local", f"model.path={model}", "data=local", "data.train=taught.jsonl", "data.chat=true",
        "data.max_tokens=512", "loss=sft_ref", "optimizer.lr=5e-3", "epochs=4", "global_pairs=16", "eval_every=0",
        "run_dir=sft",
    )  # fmt: skip
    asked = ["chat=true", "verifier=gsm8k_flexible", "sampling.max_new_tokens=200"]
    told = called(
        "dpo-sample", "model=local", "model.path=sft", "prompts=discriminator.jsonl", "chosen=answer", "pairs=verified",
        "sampling.samples_per_prompt=2", "out=gsm8k_sampled.jsonl", *asked,
    )  # fmt: skip
    print(told)
    pairs = [json.loads(line) for line in (tmp_path / "gsm8k_sampled.jsonl").read_text().splitlines()]
    assert len(pairs) > 120
    assert pairs[0]["prompt"][-1]["role"] == "user"
    told = called(
        "dpo-train", "recipe=gsm8k_pdpo", "model=local", "model.path=sft/final", "hardware.num_workers=2",
        "hardware.device=cpu", "rollout.max_new_tokens=200", "rollout.prompts_per_step=4", "global_pairs=16",
        "epochs=2", "optimizer.lr=3e-4", "optimizer.warmup_steps=0", "data.eval_fraction=0.15", "run_dir=pdpo",
        "eval_every=0", "log_every=5",
    )  # fmt: skip
    assert "2 ranks" in told
    first, *_, last = workplace.metrics("pdpo", "eval")
    assert first["loss"] == pytest.approx(LN2, abs=1e-5)
    assert last["loss"] < first["loss"]
    assert last["rewards/accuracies"] > first["rewards/accuracies"]
    generated = workplace.metrics("pdpo", "train")
    assert all(row["generator/staleness"] == 0 and row["generator/length"] > 10 for row in generated)
    assert any(row["generator/eos_rate"] > 0 for row in generated)
    test_rows = real_data / "gsm8k/test.jsonl"
    told = called(
        "dpo-eval", "model=local", "model.path=pdpo", "compare=sft", f"prompts={test_rows}", "limit=60",
        "out=result.json", *asked,
    )  # fmt: skip
    print(told)
    result = json.loads((tmp_path / "result.json").read_text())
    assert "mcnemar" in json.dumps(result).lower()


def conversations(folder: Path, real_data: Path) -> Path:
    return shutil.copy(real_data / "preferences" / "dpo_en_demo.json", folder / "conversations.json")


def assert_rendered_as_chat(run: Path) -> None:
    report = json.loads((run / "data.json").read_text())
    assert "<|im_start|>assistant" in report["samples"][0]["prompt"]
    assert report["samples"][0]["responses"][0].endswith("<|im_end|>")


def test_real_conversations_through_the_real_chat_template(tmp_path: Path, real_data: Path) -> None:
    """300 conversations are few: a linear model of word counts tells 64% of held-out pairs apart, give or take 6."""
    text = conversations(tmp_path, real_data).read_text(encoding="utf-8")
    model = random_model(
        tmp_path / "model", small_tokenizer(tmp_path / "tokenizer", real_data, iter(text.splitlines()))
    )
    sft_then_dpo(
        Workplace(tmp_path, threads=2), model,
        "data.train=conversations.json", "data.eval_fraction=0.2", "data.max_tokens=1536",
        "tokens_per_microbatch=4096", "global_pairs=8", "eval_every=0", "save_every=0",
        sft=("optimizer.lr=5e-3", "epochs=6"), dpo=("optimizer.lr=2e-5", "epochs=2"),
    )  # fmt: skip
    assert_rendered_as_chat(tmp_path / "dpo")


def test_real_conversations_with_the_real_tokenizer(tmp_path: Path, real_data: Path) -> None:
    """Most of 151,936 tokens occur in one conversation or none: the pairs are learnt, and little beyond them."""
    conversations(tmp_path, real_data)
    model = random_model(tmp_path / "model", real_data / "qwen2-tokenizer", hidden=32)
    workplace = Workplace(tmp_path, threads=2)
    common = [
        "model=local", "data=local", "hardware.device=cpu", "data.train=conversations.json", "data.eval_fraction=0.2",
        "data.max_tokens=1024", "tokens_per_microbatch=4096", "global_pairs=8", "eval_every=0", "save_every=0",
    ]  # fmt: skip
    words = [*common, f"model.path={model}", "loss=sft_ref", "run_dir=sft", "optimizer.lr=1e-2", "epochs=3"]
    assert workplace.shell(*words, timeout=TIMEOUT).returncode == 0
    first, *_, last = workplace.metrics("sft", "eval")
    assert last["loss"] < first["loss"] - 1
    assert last["logps/chosen"] > first["logps/chosen"]
    # Averages: the sums of random models prefer the longer response, whatever it says.
    words = [*common, "model.path=sft/final", "run_dir=dpo", "loss.average_logps=true", "loss.beta=10"]
    done = workplace.shell(*words, "optimizer.lr=2e-5", "epochs=2", timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    first, *_, last = workplace.metrics("dpo", "eval")
    assert first["loss"] == pytest.approx(LN2, abs=1e-5)
    assert last["rewards/accuracies"] > first["rewards/accuracies"]
    # The last ten steps that were averaged; the two after them are few pairs.
    learnt = next(row for row in workplace.metrics("dpo", "train")[::-1] if row["step"] % 10 == 0)["rewards/accuracies"]
    assert learnt > 0.8
    assert_rendered_as_chat(tmp_path / "dpo")
    print(
        f"\nconversations, real tokenizer: dpo held-out loss {first['loss']:.6f} -> {last['loss']:.4f}, reward "
        f"accuracy {first['rewards/accuracies']:.1%} -> {last['rewards/accuracies']:.1%}, of training {learnt:.1%}"
    )
