"""The text of --help, written from the shipped configuration files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_cli.config.shipped import CONF_FOLDER, GROUPS, DocumentedKey, choices, documented_keys, file_of

_HEAD = """\
dpo-train: from preference data to a trained policy, by DPO and its relatives.

  dpo-train                                              the embedded example, two minutes on two cores
  dpo-train model=local model.path=my-model data=local data.train=pairs.jsonl data.eval=heldout.jsonl
  dpo-train -m model=qwen2-7b loss.beta=0.05,0.1,0.5     a sweep; the reference is scored once

Groups: choose with GROUP=CHOICE; dpo-train show=GROUP tells what each choice is
"""
_OPTIONS = """
Options
  -m, --multirun      train once for every combination of the values given, or search ranges: sweep.sampler
  --cfg job           show the configuration instead of training with it
  --config-dir DIR    look for configuration files in DIR as well
  --config-name NAME  start from NAME.yaml of that folder, whose defaults list begins with `config`
  --completion SHELL  print what makes bash, zsh or fish complete groups, choices and keys
  --help, --help-all  this page, and the one with every key
  --version
"""
_ON = """
Where to go on
  dpo-train show=keys         every key with its meaning and default; show=loss/kto: those of one choice
  dpo-train ... plan=true     what a run will need of memory, disk and time; nothing is started
  dpo-data ...                what training would make of the data; dpo-sample, dpo-eval, dpo-export: see their --help
"""
# What most runs set, in the order in which one comes upon it.
OFTEN_SET = {
    "model.path=FOLDER": "with model=local: a folder in Hugging Face format, a run folder, or a hub name",
    "model.lora.rank=16": "train adapters instead of all weights",
    "data.train=FILE": "with data=local: JSON, JSONL, Parquet or CSV, a folder, a hub name, or a list of these",
    "data.eval=FILE": "held-out data; data.eval_fraction=0.05 splits them off instead",
    "data.max_tokens=2048": "longest prompt + response; data.on_long says what becomes of longer ones",
    "loss.beta=0.1": "strength of the pull towards the reference",
    "optimizer.lr=5e-7": "peak learning rate; adapters want about ten times as much",
    "epochs=1": "passes over the data; max_steps=200 ends sooner",
    "global_pairs=64": "pairs per optimiser step: part of the experiment",
    "tokens_per_microbatch=8192": "tokens in one forward pass: smaller where memory runs out; changes no result",
    "run_dir=outputs/NAME": "where everything of the run goes",
    "resume=outputs/NAME": "go on with a run where it stopped",
}
_FILES = (
    ("config.yaml", ""),
    ("model/_base.yaml", "model"),
    ("data/_base.yaml", "data"),
    ("loss/dpo.yaml", "loss"),
    ("optimizer/_base.yaml", "optimizer"),
    ("hardware/single_gpu.yaml", "hardware"),
)
_TAIL = """
Text with braces, commas or line breaks goes into single quotes, so that the shell leaves it alone:
  'data.prompt_template=Question: {question}\\n\\nAnswer: '

Exit codes: 0 done, 2 bad input (nothing was trained), 3 a loss or gradient that is not finite, 4 ended early by
health.stop_on, 75 stopped by a signal after saving (resume it), 130 stopped at once.
"""
_WIDTH = 110


def help_text() -> str:
    """What one begins with."""
    often = ["", "Often set", *(f"  {example:<28}{told}" for example, told in OFTEN_SET.items()), ""]
    return _HEAD + "\n".join([*_listed(GROUPS), *often]) + _OPTIONS + _ON + _TAIL


def every_key() -> str:
    """The page with every key."""
    return page(_HEAD, GROUPS, _FILES, _OPTIONS + _TAIL)


def page(head: str, groups: Sequence[str], files: Sequence[tuple[str, str]], tail: str) -> str:
    """head, the choices of groups, the keys of files (each with the section they are keys of), tail."""
    keys = ["", "Keys: set with KEY=VALUE. Shown with their defaults.", *_keys(groups, files)]
    return head + "\n".join([*_listed(groups), *keys]) + tail


def keys_of(file: Path, section: str) -> list[str]:
    """The keys of one choice, those of the file it builds on included, as the long page shows them."""
    base = file_of(section, "_base")
    keys = {key.name: key for key in (documented_keys(base, section) if base.exists() else ())}
    for key in documented_keys(file, section):
        # What the file it builds on explains need not be explained again.
        keys[key.name] = replace(key, meaning=key.meaning or keys.get(key.name, key).meaning)
    return [_entry(key) for key in keys.values() if key.default]


def _listed(groups: Sequence[str]) -> list[str]:
    return [
        textwrap.fill(f"  {group:<11}{', '.join(choices(group)) or '(none)'}", _WIDTH, subsequent_indent=" " * 13)
        for group in groups
    ]


def _keys(groups: Sequence[str], files: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, section in files:
        for key in documented_keys(CONF_FOLDER / name, section):
            if key.meaning and key.name not in groups and key.default:
                yield _entry(key)


def _entry(key: DocumentedKey) -> str:
    sentence = key.meaning.partition(". ")[0].rstrip(".")
    head = f"  {f'{key.name}={key.default}':<36}"
    # A default as long as the column gets a line of its own.
    lead = head if head.endswith(" ") else f"{head}\n{' ' * 38}"
    first_indent = len(lead.splitlines()[-1])
    body = textwrap.fill(sentence, _WIDTH, initial_indent=" " * first_indent, subsequent_indent=" " * 38)
    return (lead + body[first_indent:]).rstrip()
