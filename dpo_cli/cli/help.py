"""The text of --help, written from the shipped configuration files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from dpo_cli.config.shipped import CONF_FOLDER, GROUPS, DocumentedKey, choices, documented_keys

_HEAD = """\
dpo-train: from preference data to a trained policy, by DPO and its relatives.

  dpo-train                                              the embedded example, two minutes on two cores
  dpo-train model=local model.path=my-model data=local data.train=pairs.jsonl data.eval=heldout.jsonl
  dpo-train model=qwen2-7b loss.beta=0.2                 UltraFeedback unless data= says otherwise
  dpo-train -m loss.beta=0.05,0.1,0.5                    a sweep; the reference is scored once
  dpo-train --config-dir my_conf --config-name my_run    files of your own
  dpo-train resume=outputs/...                           go on where a run stopped

Options
  -m, --multirun      train once for every combination of the values given
  --cfg job           show the configuration instead of training with it
  --config-dir DIR    look for configuration files in DIR as well
  --config-name NAME  start from NAME.yaml of that folder, whose defaults list begins with `config`
  --version, --help

Groups: choose with GROUP=CHOICE
"""
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
    return page(_HEAD, GROUPS, _FILES, _TAIL)


def page(head: str, groups: Sequence[str], files: Sequence[tuple[str, str]], tail: str) -> str:
    """head, the choices of groups, the keys of files (each with the section they are keys of), tail."""
    listed = [
        textwrap.fill(f"  {group:<11}{', '.join(choices(group)) or '(none)'}", _WIDTH, subsequent_indent=" " * 13)
        for group in groups
    ]
    keys = ["", "Keys: set with KEY=VALUE. Shown with their defaults.", *_keys(groups, files)]
    return head + "\n".join([*listed, *keys]) + tail


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
    return lead + body[first_indent:]
