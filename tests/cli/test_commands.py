"""The commands beside dpo-train up to the moment at which they import torch: help, configuration, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_cli.cli.chat import main as chat_main
from dpo_cli.cli.data import main as data_main
from dpo_cli.cli.eval import main as eval_main
from dpo_cli.cli.sample import main as sample_main
from dpo_cli.config.check import TRAINING, check_by
from dpo_cli.config.command_checks import CHAT, DATA_CHECK, EVAL, SAMPLE
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.config.shipped import COMMAND_GROUPS, CONF_FOLDER, documented_keys

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "peft", "tensorboard")
MAINS = {"sample": sample_main, "eval": eval_main, "data": data_main, "chat": chat_main}
_ANSWER_AND_LIST_MODULES = """
import sys
from dpo_cli.cli.{command} import main
code = main(sys.argv[1:])
print(code, *sorted(set(sys.modules) & set({heavy!r})), sep=",", file=sys.stderr)
"""
SAMPLE_WORDS = ("model=tiny", "prompts=q.jsonl", "out=new.jsonl")
EVAL_WORDS = ("model=tiny", "prompts=q.jsonl")
MODEL = ("model=local", "model.path=my-model")


@pytest.fixture(autouse=True)
def files(folder: Path) -> Path:
    (folder / "q.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    (folder / "there.jsonl").touch()
    (folder / "my-model").mkdir()
    run = folder / "run"
    run.mkdir()
    for name in ("overrides.yaml", "config.yaml"):
        (run / name).touch()
    return folder


@pytest.mark.parametrize("command", MAINS)
@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--version"], 0), (["sampling.temp=1"], 2)])
def test_a_quick_answer_imports_nothing_heavy(command: str, words: list[str], code: int) -> None:
    script = _ANSWER_AND_LIST_MODULES.format(command=command, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == str(code)


@pytest.mark.parametrize("command", ["sample", "eval", "chat"])
def test_help_lists_every_key_of_its_file_and_fits_a_terminal(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MAINS[command](["--help"]) == 0
    text = capsys.readouterr().out
    for key in documented_keys(CONF_FOLDER / f"{command}.yaml"):
        assert not key.default or f"  {key.name}=" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("rules", "name"), [(SAMPLE, "sample"), (EVAL, "eval"), (CHAT, "chat")])
def test_the_schema_and_the_file_know_the_same_keys(rules: Any, name: str) -> None:
    known = {key for key in rules.known_keys({}) if not key.startswith(("model.", "hardware."))}
    documented = {key.name for key in documented_keys(CONF_FOLDER / f"{name}.yaml") if key.name != "sampling"}
    assert known == documented


def test_a_model_that_brings_data_to_training_brings_none_here() -> None:
    composition = compose(Request(SAMPLE_WORDS, None, "sample", groups=COMMAND_GROUPS, program="dpo-sample"))
    assert check_by(SAMPLE, composition).model.path == "dpo_cli://example/base"
    assert "data" not in composition.values


def test_cfg_job_shows_the_configuration_and_makes_nothing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(files.iterdir())
    assert sample_main([*SAMPLE_WORDS, "sampling.top_k=5", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["sampling"]["top_k"] == 5
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("command", ["sample", "eval", "chat"])
def test_ones_own_configuration_file_builds_on_the_shipped_one(
    command: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "conf").mkdir()
    (files / "conf" / "mine.yaml").write_text(f"defaults:\n  - {command}\n  - _self_\nseed: 7\n")
    words = {"sample": SAMPLE_WORDS, "eval": EVAL_WORDS, "chat": MODEL}[command]
    assert MAINS[command](["--config-dir", "conf", "--config-name", "mine", *words, "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7


Refused = Callable[..., str]


@pytest.fixture
def refused_by(capsys: pytest.CaptureFixture[str], files: Path) -> Refused:
    """Run a command with bad input: what it says, having ended with exit code 2 and left nothing behind."""

    def call(command: str, *words: str) -> str:
        before = sorted(files.iterdir())
        assert MAINS[command](words) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "Traceback" not in said.err
        assert said.err.startswith(f"dpo-{command}: ")
        assert sorted(files.iterdir()) == before
        return said.err

    return call


SAMPLE_CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nothing given": ((), ("3 problems", "prompts must be given", "out must be given", "model.path must be given")),
    "misspelt key": ((*SAMPLE_WORDS, "sampling.temprature=1"), ("sampling.temprature", "did you mean temperature?")),
    "key of another section": ((*SAMPLE_WORDS, "temperature=1"), ("did you mean sampling.temperature?",)),
    "key of dpo-train": ((*SAMPLE_WORDS, "loss.beta=1"), ("no key loss.beta", "did you mean beta?")),
    "group of dpo-train": ((*SAMPLE_WORDS, "data=arithmetic"), ("There is no key data.",)),
    "wrong type": ((*SAMPLE_WORDS, "sampling.samples_per_prompt=two"), ("whole number",)),
    "out of range": ((*SAMPLE_WORDS, "sampling.top_p=1.5"), ("sampling.top_p", "at most 1")),
    "unknown verifier": ((*SAMPLE_WORDS, "verifier=gsm9k"), ("did you mean gsm8k?", "gsm8k_flexible")),
    "missing prompts": (("model=tiny", "prompts=p.jsonl", "out=new.jsonl"), ("p.jsonl", "did you mean q.jsonl?")),
    "missing model": (("model=local", "model.path=my-modle", *SAMPLE_WORDS[1:]), ("did you mean my-model?",)),
    "never written over": ((*SAMPLE_WORDS[:2], "out=there.jsonl"), ("there already", "nothing is written over")),
    "second output": (
        (*SAMPLE_WORDS, "pairs=verified", "verifier=exact", "samples_out=there.jsonl"),
        ("samples_out", "there already"),
    ),
    "one file twice": (
        (*SAMPLE_WORDS, "pairs=verified", "verifier=exact", "samples_out=new.jsonl"),
        ("the same file",),
    ),
    "in a file": ((*SAMPLE_WORDS[:2], "out=q.jsonl/new.jsonl"), ("is a file",)),
    "greedy many": ((*SAMPLE_WORDS, "sampling.temperature=0"), ("all 4 samples",)),
    "pairs unjudged": ((*SAMPLE_WORDS, "pairs=verified"), ("no verifier", "verifier=gsm8k")),
    "pairs of one": (
        (*SAMPLE_WORDS, "pairs=verified", "verifier=exact", "sampling.samples_per_prompt=1"),
        ("two samples",),
    ),
    "rewards without reference": ((*SAMPLE_WORDS, "pairs=best_worst"), ("model.reference", "none is named")),
    "rewards without scale": (
        (*SAMPLE_WORDS, "pairs=best_worst", "model.reference=./my-model"),
        ("beta", "beta=0.1"),
    ),
    "chosen for nothing": ((*SAMPLE_WORDS, "chosen=q.jsonl"), ("chosen is for pairs", "pairs=verified")),
    "chosen missing": (
        (*SAMPLE_WORDS, "pairs=verified", "verifier=exact", "chosen=absent.jsonl"),
        ("no file or folder absent.jsonl",),
    ),
    "template without a field": ((*SAMPLE_WORDS, "prompt_template=Answer this"), ("names no column",)),
    "sweep": ((*SAMPLE_WORDS, "seed=1,2"), ("several values", "seed=[1,2] is one list")),
    "-m": ((*SAMPLE_WORDS, "-m"), ("no -m",)),
    "resume": ((*SAMPLE_WORDS, "resume=x"), ("the same command given again",)),
    "option": ((*SAMPLE_WORDS, "--temperature=1"), ("no option", "temperature=1 (keys have no dashes)")),
    "workers": ((*SAMPLE_WORDS, "hardware.num_workers=2"), ("one process",)),
    "secret": ((*SAMPLE_WORDS, "prompts=hf_abcdefghijklmnopqrstuvwxyzABCD"), ("token",)),
}
EVAL_CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no prompts": (("model=tiny",), ("mode=task needs prompts", "prompts=FILE")),
    "no data": (("model=tiny", "mode=preferences"), ("mode=preferences needs data", "none is named")),
    "the wrong input": (("model=tiny", "mode=rewards", "prompts=q.jsonl", "out=x"), ("needs data",)),
    "two inputs": ((*EVAL_WORDS, "data=q.jsonl"), ("does not read data", "mode=preferences")),
    "rewards to nowhere": (
        ("mode=rewards", *MODEL, "model.reference=./my-model", "beta=1", "data=q.jsonl"),
        ("writes a file",),
    ),
    "unknown mode": ((*EVAL_WORDS, "mode=taks"), ("did you mean task?",)),
    "too few samples": ((*EVAL_WORDS, "pass_at=[1,8]"), ("8 samples", "sampling.samples_per_prompt=8")),
    "one result": (("mode=compare", "compare=q.jsonl"), ("compare names 1",)),
    "missing result": (("mode=compare", "compare=[q.jsonl,absent.json]"), ("absent.json",)),
    "missing comparison": ((*EVAL_WORDS, "compare=./absent"), ("no file or folder ./absent",)),
    "start": (
        ("mode=preferences", *MODEL, "data=q.jsonl", "model.reference=start", "beta=1"),
        ("model.reference", "FOLDER"),
    ),
}


@pytest.mark.parametrize("case", SAMPLE_CASES)
def test_bad_input_to_dpo_sample_is_refused_with_a_way_out(case: str, refused_by: Refused) -> None:
    words, expected = SAMPLE_CASES[case]
    said = refused_by("sample", *words)
    for part in expected:
        assert part in said


@pytest.mark.parametrize("case", EVAL_CASES)
def test_bad_input_to_dpo_eval_is_refused_with_a_way_out(case: str, refused_by: Refused) -> None:
    words, expected = EVAL_CASES[case]
    said = refused_by("eval", *words)
    for part in expected:
        assert part in said


def test_a_run_needs_no_reference_and_no_beta() -> None:
    words = ("mode=preferences", "model=local", "model.path=run", "data=q.jsonl")
    config = check_by(EVAL, compose(Request(words, None, "eval", groups=COMMAND_GROUPS, program="dpo-eval")))
    assert (config.beta, config.model.reference) == (None, None)


def test_a_launcher_is_not_needed(monkeypatch: pytest.MonkeyPatch, refused_by: Refused) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "starts its processes by itself" in refused_by("sample", *SAMPLE_WORDS)


DATA = ("model=tiny", "data=local", "data.train=q.jsonl")
DATA_CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "misspelt key": ((*DATA, "simlarity=0.5"), ("simlarity", "did you mean similarity?")),
    "misspelt key of training": ((*DATA, "data.max_token=5"), ("did you mean max_tokens?",)),
    "unknown finding": ((*DATA, "fail_on=[overlapp]"), ("no finding overlapp", "did you mean overlap?")),
    "out of range": ((*DATA, "similarity=1.5"), ("similarity", "at most 1")),
    "missing data": (("data=local", "data.train=p.jsonl"), ("p.jsonl", "did you mean q.jsonl?")),
    "never written over": ((*DATA, "out=there.jsonl"), ("there already", "nothing is written over")),
    "sweep": ((*DATA, "-m"), ("no -m",)),
    "what no training could be": ((*DATA, "epochs=null", "max_steps=null"), ("would never end",)),
    "nowhere to convert to": (("convert", "data.train=q.jsonl"), ("out must be given",)),
    "unknown form": (("convert", "data.train=q.jsonl", "out=x.csv"), (".jsonl, .parquet",)),
    "convert over a file": (("convert", "data.train=q.jsonl", "out=there.jsonl"), ("there already",)),
    "convert with a model": (("convert", "data.train=q.jsonl", "out=x.jsonl", "model=tiny"), ("no key model",)),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_bad_input_to_dpo_data_is_refused_with_a_way_out(case: str, refused_by: Refused) -> None:
    words, expected = DATA_CASES[case]
    said = refused_by("data", *words)
    for part in expected:
        assert part in said


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"]])
def test_help_of_dpo_data_fits_a_terminal(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert data_main(words) == 0
    text = capsys.readouterr().out
    name = "convert" if len(words) > 1 else "check"
    for key in documented_keys(CONF_FOLDER / f"{name}.yaml"):
        assert f"  {key.name}=" in text
    assert max(map(len, text.splitlines())) <= 120


def test_dpo_data_knows_every_key_of_training_and_its_own() -> None:
    known = set(DATA_CHECK.known_keys({}))
    assert known > set(TRAINING.known_keys({}))
    own = {key.name for key in documented_keys(CONF_FOLDER / "check.yaml")}
    assert known - set(TRAINING.known_keys({})) == own
