"""Bad input ends in one clear message and exit code 2, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

REAL = "model=qwen2-0.5b"
Refused = Callable[..., str]

# What is typed; what the message has to say: the fault, its place, the way out.
CASES = {
    "misspelt loss parameter": (
        [REAL, "loss.beat=0.2"],
        ["no parameter beat", "loss.beat, command line", "did you mean beta?"],
    ),
    "misspelt key": ([REAL, "optimizer.warmup_step=3"], ["no key optimizer.warmup_step", "did you mean warmup_steps?"]),
    "key in the wrong place": ([REAL, "beta=0.2"], ["no key beta", "did you mean loss.beta?"]),
    "another trainer's key": ([REAL, "learning_rate=1e-6"], ["no key learning_rate", "did you mean optimizer.lr?"]),
    "key that is derived": ([REAL, "gradient_accumulation_steps=4"], ["leave it out", "global_pairs"]),
    "key of another optimiser": ([REAL, "optimizer.momentum=0.9"], ["optimizer.momentum", "optimizer=rmsprop has it"]),
    "parameter of another loss": (
        [REAL, "loss=ipo", "loss.reference_free=true"],
        ["no parameter reference_free", "loss=dpo has it"],
    ),
    "parameter of other losses": (
        [REAL, "loss=hinge", "loss.average_logps=true"],
        ["no parameter average_logps", "loss=dpo and loss=ipo have it"],
    ),
    "mix of what is not there": ([REAL, "loss=mix", "loss.losses=[{loss: dpoo, weight: 1}]"], ["did you mean dpo?"]),
    "mix of text": ([REAL, "loss=mix", "loss.losses=dpo"], ["loss.losses must be a list of parts, not 'dpo'"]),
    "part without its weight": (
        [REAL, "loss=mix", "loss.losses=[{loss: dpo, weight: 1}, {loss: ipo}]"],
        ["loss.losses[1] must be of the form {loss: NAME, weight: NUMBER}", "command line"],
    ),
    "part that weighs nothing": (
        [REAL, "loss=mix", "loss.losses=[{loss: dpo, weight: 0}]"],
        ["loss.losses[0].weight must be a number greater than 0, not 0"],
    ),
    "part with another's parameter": (
        [REAL, "loss=mix", "loss.losses=[{loss: hinge, weight: 1, tau: 1}]"],
        ["hinge_loss has no parameter tau", "loss=discopop has it"],
    ),
    "part out of range": (
        [REAL, "loss=mix", "loss.losses=[{loss: exo_pair, weight: 1, label_smoothing: 0}]"],
        ["loss.losses[0].label_smoothing must be greater than 0 and less than 0.5"],
    ),
    "part without what it needs": (
        [REAL, "loss=mix", "loss.losses=[{loss: simpo, weight: 1, beta: 2}]"],
        ["loss.losses[0].gamma must be given"],
    ),
    "divergence from nothing": (
        [REAL, "loss.reference_free=true", "loss.f_divergence=forward_kl"],
        ["loss.f_divergence=forward_kl is measured from a reference", "loss.reference_free=false"],
    ),
    "unknown divergence": (
        [REAL, "loss.f_divergence=kl"],
        ["loss.f_divergence must be one of reverse_kl, forward_kl, js_divergence, alpha_divergence"],
    ),
    "divergence out of range": ([REAL, "loss.f_alpha=1.5"], ["loss.f_alpha must be at least 0 and at most 1"]),
    "misspelt group": (["modle=tiny", "model=qwen2-0.5b"], ["no key modle", "did you mean model?"]),
    "unknown model": (["model=qwen2-7c"], ["no model qwen2-7c", "did you mean qwen2-7b?", "llama3-8b"]),
    "unknown loss": ([REAL, "loss=dpoo"], ["no loss dpoo", "did you mean dpo?"]),
    "unknown logger": ([REAL, "logger=[tensorbord]"], ["no logger tensorbord", "did you mean tensorboard?"]),
    "unknown recipe": (["recipe=gsm8k"], ["no recipe gsm8k", "one of"]),
    "list for one choice": ([REAL, "loss=[dpo,ipo]"], ["loss takes one choice"]),
    "text for a number": ([REAL, "optimizer.lr=fast"], ["optimizer.lr must be a number, not 'fast'"]),
    "fraction for a count": ([REAL, "max_steps=1.5"], ["max_steps must be a whole number, not 1.5"]),
    "truth for a count": ([REAL, "seed=true"], ["seed must be a whole number, not true"]),
    "text for a truth": ([REAL, "deterministic=yes_please"], ["deterministic must be true or false"]),
    "unknown word": (
        [REAL, "optimizer.schedule=cosin"],
        ["optimizer.schedule cannot be 'cosin'", "did you mean cosine?"],
    ),
    "negative beta": ([REAL, "loss.beta=-0.1"], ["loss.beta must be greater than 0, not -0.1"]),
    "smoothing of one half": ([REAL, "loss.label_smoothing=0.5"], ["less than 0.5, not 0.5"]),
    "negative NLL weight": ([REAL, "loss.nll_alpha=-1"], ["loss.nll_alpha must be at least 0"]),
    "nothing is held out of nothing": ([REAL, "data.eval_fraction=1"], ["data.eval_fraction must be less than 1"]),
    "learning rate of zero": ([REAL, "optimizer.lr=0"], ["optimizer.lr must be greater than 0"]),
    "learning rate that is not a number": ([REAL, "optimizer.lr=nan"], ["optimizer.lr must be"]),
    "too few betas": ([REAL, "optimizer.betas=[0.9]"], ["optimizer.betas"]),
    "null where a value is needed": ([REAL, "seed=null"], ["seed must be a whole number, not null"]),
    "no data": ([REAL, "data.train=[]"], ["data.train names no data"]),
    "rows longer than a micro-batch": (
        [REAL, "data.max_tokens=9000"],
        ["data.max_tokens is 9000", "tokens_per_microbatch=9000"],
    ),
    "no end": ([REAL, "epochs=null"], ["training would never end", "epochs=1"]),
    "warm-up without end": ([REAL, "max_steps=5"], ["optimizer.warmup_steps is 10", "never peaks"]),
    "adapter of unclear standing": (
        [REAL, "model.adapter=org/adapter"],
        ["model.reference=start", "model.reference=base"],
    ),
    "reference without reference": (
        [REAL, "loss.reference_free=true", "model.reference=org/other"],
        ["leaves the reference out", "org/other"],
    ),
    "checkpoints": ([REAL, "model.checkpoint_every=2"], ["gradient_checkpointing is off", "=true"]),
    "8 bits under ZeRO": (
        [REAL, "optimizer.state_bits=8", "hardware=deepspeed_zero2"],
        ["cannot be partitioned", "state_bits=32"],
    ),
    "attention": ([REAL, "model.attention=flesh"], ["model.attention", "flash"]),
    "float16": ([REAL, "model.dtype=float16"], ["overflow", "model.dtype=bfloat16"]),
    "template without a column": ([REAL, "data.prompt_template=Question:"], ["names no column"]),
    "held out twice": (
        [REAL, "data.eval=org/held-out", "data.eval_fraction=0.1"],
        ["data.eval names the held-out data", "leave one of the two out"],
    ),
    "local model without a path": (["model=local"], ["model.path must be given", "model.path=..."]),
    "local data without a path": ([REAL, "data=local"], ["data.train must be given"]),
    "missing data file": (
        [REAL, "data.train=pears.jsonl"],
        ["no file or folder pears.jsonl", "did you mean pairs.jsonl?"],
    ),
    "missing local data": ([REAL, "data=local", "data.train=pears"], ["no file or folder pears"]),
    "missing model folder": (
        ["model=local", "model.path=./mymodel"],
        ["no file or folder ./mymodel", "did you mean my-model?"],
    ),
    "file for a model": (["model=local", "model.path=pairs.jsonl"], ["pairs.jsonl is a file; a model is a folder"]),
    "word without a value": ([REAL, "resolve"], ["'resolve' is not of the form key=value"]),
    "unreadable value": ([REAL, "run_dir={"], ["'run_dir={' cannot be read", "quote"]),
    "sweep without -m": ([REAL, "loss.beta=0.1,0.2"], ["several values", "dpo-train -m loss.beta=0.1,0.2"]),
    "option of another tool": ([REAL, "--learning-rate=3"], ["no option --learning-rate=3", "keys have no dashes"]),
    "option without its value": ([REAL, "--config-dir"], ["--config-dir", "--help"]),
    "Hydra's own settings": ([REAL, "hydra.run.dir=x"], ["Hydra's own settings", "run_dir=FOLDER"]),
    "nothing to delete": ([REAL, "~loss.gamma"], ["no loss.gamma to delete"]),
    "circular reference": ([REAL, "run_dir=${store_dir}", "store_dir=${run_dir}"], ["cannot be worked out"]),
    "reference to nothing": ([REAL, "run_dir=${output_root}/x"], ["run_dir cannot be worked out", "output_root"]),
    "interval in a grid": (["-m", REAL, "loss.beta=interval(0.1,1)"], ["no list of values", "sweep.sampler=tpe"]),
    "search without an end": (["-m", REAL, "loss.beta=1,2", "sweep.sampler=tpe"], ["never ends", "sweep.trials=20"]),
    "trials of a grid": (["-m", REAL, "loss.beta=1,2", "sweep.trials=3"], ["sweep.trials is for searches"]),
    "sweep of how to sweep": (["-m", REAL, "sweep.metric=a,b", "seed=1,2"], ["sweep.metric says how to sweep"]),
    "partition without a cluster": (["-m", REAL, "seed=1,2", "sweep.partition=gpu"], ["for jobs on a cluster"]),
    "sweep of the folder": (["-m", REAL, "run_dir=a,b"], ["run_dir cannot be swept"]),
    "sweep of a loss that is not there": (
        ["-m", REAL, "loss=dpo,ipo,simpoo"],
        ["no loss simpoo", "did you mean simpo?"],
    ),
    "resume without a folder": (["resume="], ["resume= names no run folder"]),
    "resume of nothing": (["resume=outputs/nowhere"], ["no run folder outputs/nowhere"]),
    "resume of another folder": (["resume=my-model"], ["my-model is not a run folder"]),
    "resume into another folder": (["resume=my-model", "run_dir=x"], ["two folders for one run"]),
    "missing config folder": (["--config-dir", "nowhere", REAL], ["no folder nowhere"]),
    "missing config file": (["--config-dir", "my-model", "--config-name", "my_run"], ["no my_run.yaml in my-model"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_its_fault_its_place_and_a_way_out(case: str, folder: Path, refused: Refused) -> None:
    (folder / "my-model").mkdir()
    (folder / "pairs.jsonl").touch()
    words, expected = CASES[case]
    said = refused(*words)
    for part in expected:
        assert part in said
    assert sorted(path.name for path in folder.iterdir()) == ["my-model", "pairs.jsonl"]


def test_all_problems_are_told_together(refused: Refused) -> None:
    words = [
        "modell=tiny",
        "model=qwen2-7c",
        "loss.beat=1",
        "seed=x",
        "loss.label_smoothing=2",
        "x={",
        "epochs=null",
        "max_steps=null",
    ]
    said = refused(*words)
    assert said.startswith("dpo-train: 7 problems:")
    for part in ("modell", "qwen2-7c", "beat", "seed", "label_smoothing", "x={", "never end"):
        assert part in said


def test_a_problem_in_a_file_names_the_file(folder: Path, refused: Refused) -> None:
    (folder / "conf").mkdir()
    file = folder / "conf" / "my_run.yaml"
    file.write_text("defaults: [config, override model: qwen2-7b, _self_]\noptimizer:\n  lr: high\nmax_step: 3\n")
    said = refused("--config-dir", "conf", "--config-name", "my_run")
    assert "optimizer.lr must be a number, not 'high'" in said
    assert "did you mean max_steps?" in said
    assert said.count("my_run.yaml") == 2


def test_a_file_with_the_name_of_a_shipped_one_is_refused(folder: Path, refused: Refused) -> None:
    (folder / "conf" / "loss").mkdir(parents=True)
    (folder / "conf" / "loss" / "dpo.yaml").write_text("beta: 1\n")
    said = refused("--config-dir", "conf", REAL)
    assert "conf/loss/dpo.yaml has the name of a shipped file" in said
    assert "my_dpo.yaml" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loss:\n  beta: [1\n", ["Not valid YAML", "my_run.yaml, line"]),
        ("- a\n- b\n", ["my_run"]),
        ("defaults: [config, override model: qwen2-7c]\n", ["qwen2-7c", "qwen2-7b"]),
        ("defaults: [config, {override colour: red}]\n", ["colour"]),
        ("hydra:\n  run: {dir: x}\ndefaults: [config, override model: qwen2-7b, _self_]\n", ["Hydra's own settings"]),
        ("defaults: [config, override model: qwen2-7b, _self_]\nresume: outputs/x\n", ["belongs on the command line"]),
        ("defaults: [config, override model: qwen2-7b, _self_]\ndata: 5\n", ["data"]),
        ("seed: 3\n", ["No model is chosen"]),
    ],
)
def test_an_unusable_file_is_named(text: str, expected: list[str], folder: Path, refused: Refused) -> None:
    (folder / "conf").mkdir()
    (folder / "conf" / "my_run.yaml").write_text(text)
    said = refused("--config-dir", "conf", "--config-name", "my_run")
    for part in expected:
        assert part in said


def test_a_run_folder_that_exists_is_never_written_over(folder: Path, refused: Refused) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "overrides.yaml").write_text("kept")
    said = refused(REAL, "run_dir=old")
    assert "old holds a run already" in said
    assert "dpo-train resume=old" in said
    assert (folder / "old" / "overrides.yaml").read_text() == "kept"


def test_a_folder_of_something_else_is_never_filled(folder: Path, refused: Refused) -> None:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").touch()
    assert "thesis is not empty" in refused(REAL, "run_dir=thesis")
    (folder / "file").touch()
    assert "file is a file" in refused(REAL, "run_dir=file")
    assert "file is a file" in refused(REAL, "run_dir=file/inside")
