"""Guesses at what a misspelt or misplaced name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other trainers call things, in the words of their users' files.
FOREIGN_KEYS = {
    "learning_rate": "optimizer.lr",
    "batch_size": "global_pairs",
    "per_device_train_batch_size": "global_pairs",
    "train_batch_size": "global_pairs",
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "output_dir": "run_dir",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "logging_steps": "log_every",
    "save_total_limit": "keep_checkpoints",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "ref_model": "model.reference",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "cutoff_len": "data.max_tokens",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "clip_grad": "optimizer.max_grad_norm",
    "max_norm": "optimizer.max_grad_norm",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "rpo_alpha": "loss.nll_alpha",
    "loss_type": "loss",
    "report_to": "logger",
    "device": "hardware.device",
}
# Keys that users of other trainers look for and that need no counterpart here.
DERIVED_KEYS = {
    "gradient_accumulation_steps": "it follows from global_pairs and tokens_per_microbatch",
    "dropout": "dropout is always off, so that policy and reference are comparable",
    "lora_dropout": "dropout is always off, so that policy and reference are comparable",
    "precompute_ref_log_probs": "the reference is always scored once and stored",
}


def closest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is most likely a misspelling or a part of, or None."""
    names = list(known)
    # In a short name two letters that changed places are a third of it.
    found = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7 if len(name) > 4 else 0.6)
    if found:
        return found[0]
    longer = [each for each in names if len(name) > 3 and name.lower() in each]
    return min(longer, key=len, default=None)


def suggest_key(key: str, known: Iterable[str]) -> str | None:
    """What to write instead of an unknown dotted key: a hint, or None where nothing is near.

    Tries, in this order: the same leaf elsewhere (beta -> loss.beta), another trainer's name, a misspelt leaf in the
    same section, a misspelt whole key, a misspelt leaf anywhere.
    """
    names = list(known)
    section, _, leaf = key.rpartition(".")
    elsewhere = [name for name in names if name.rpartition(".")[2] == leaf]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    if len(elsewhere) > 1:
        return f"did you mean one of {', '.join(elsewhere)}?"
    sections = {name.partition(".")[0] for name in names}
    if leaf in FOREIGN_KEYS and FOREIGN_KEYS[leaf].partition(".")[0] in sections:
        return f"did you mean {FOREIGN_KEYS[leaf]}?"
    if leaf in DERIVED_KEYS:
        return f"leave it out: {DERIVED_KEYS[leaf]}"
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    if found := closest(leaf, siblings):
        return f"{leaf}: did you mean {found if section else siblings[found]}?"
    if found := closest(key, names):
        return f"did you mean {found}?"
    leaves = {name.rpartition(".")[2]: name for name in names}
    if found := closest(leaf, leaves):
        return f"did you mean {leaves[found]}?"
    return None


def suggest_choice(value: str, choices: Iterable[str]) -> str:
    """A hint that lists the choices, the nearest one first."""
    names = list(choices)
    listed = f"one of {', '.join(names)}"
    found = closest(value, names)
    return f"did you mean {found}? ({listed})" if found else listed
