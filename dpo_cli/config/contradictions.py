"""Settings that are each fine and cannot stand together, or name files that are not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.logger_checks import LOGGER_CHECKS
from dpo_cli.config.machine_checks import MACHINE_CHECKS, Check, Values
from dpo_cli.config.suggest import closest, suggest_choice
from dpo_cli.errors import ConfigError
from dpo_cli.health.monitor import FINDINGS
from dpo_cli.paths import PACKAGE_SCHEME, resolve_path

FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".arrow", ".gz", ".zst")
# Those that need no function of the user's; rollout/verify.py tells what each does.
_VERIFIERS = ("gsm8k", "gsm8k_flexible", "exact")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def rows_fit_a_microbatch(values: Values) -> ConfigError | None:
    longest, budget = values["data.max_tokens"], values["tokens_per_microbatch"]
    if longest <= budget:
        return None
    return ConfigError(
        f"data.max_tokens is {longest}, more than the {budget} tokens of a micro-batch.",
        where="tokens_per_microbatch",
        hint=f"tokens_per_microbatch={longest} or data.max_tokens={budget}",
    )


def training_ends(values: Values) -> ConfigError | None:
    if values["epochs"] is not None or values["max_steps"] is not None:
        return None
    return ConfigError("epochs and max_steps are both null: training would never end.", where="epochs", hint="epochs=1")


def warmup_ends(values: Values) -> ConfigError | None:
    warmup, steps = values["optimizer.warmup_steps"], values["max_steps"]
    if steps is None or warmup < steps or warmup == 0:
        return None
    return ConfigError(
        f"optimizer.warmup_steps is {warmup}, and training ends after {steps} steps: the learning rate never peaks.",
        where="optimizer.warmup_steps",
        hint=f"optimizer.warmup_steps={steps // 10}",
    )


def adapter_names_its_reference(values: Values) -> ConfigError | None:
    if values["model.adapter"] is None or values["model.reference"] is not None:
        return None
    return ConfigError(
        "model.adapter is set, and model.reference does not say whether it belongs to the reference.",
        where="model.reference",
        hint="model.reference=start (base with the adapter, after SFT) or model.reference=base (without it)",
    )


def base_reference_has_an_adapter(values: Values) -> ConfigError | None:
    if values["model.reference"] != "base" or values["model.adapter"] is not None:
        return None
    return ConfigError(
        "model.reference=base means the model without model.adapter, and there is no adapter.",
        where="model.reference",
        hint="model.reference=start, or name the adapter",
    )


def reference_free_has_no_reference(values: Values) -> ConfigError | None:
    reference = values["model.reference"]
    if not values["loss.reference_free"] or reference in (None, "start"):
        return None
    return ConfigError(
        f"loss.reference_free=true leaves the reference out, yet model.reference names one: {reference}.",
        where="loss.reference_free",
        hint="loss.reference_free=false or model.reference=null",
    )


def divergence_has_a_reference(values: Values) -> ConfigError | None:
    if not values["loss.reference_free"] or values["loss.f_divergence"] == "reverse_kl":
        return None
    return ConfigError(
        f"loss.f_divergence={values['loss.f_divergence']} is measured from a reference, which is left out.",
        where="loss.f_divergence",
        hint="loss.reference_free=false or loss.f_divergence=reverse_kl",
    )


def template_has_fields(values: Values) -> ConfigError | None:
    template = values["data.prompt_template"]
    if template is None or re.search(r"\{\w+\}", template):
        return None
    return ConfigError(
        "data.prompt_template names no column, so every prompt would be the same.",
        where="data.prompt_template",
        hint="'data.prompt_template=Question: {question}\\n\\nAnswer: '",
    )


def model_exists(values: Values) -> ConfigError | None:
    return missing_model("model.path", values["model.path"], local=values["choice.model"] == "local")


def adapter_exists(values: Values) -> ConfigError | None:
    return missing_model("model.adapter", values["model.adapter"])


def reference_exists(values: Values) -> ConfigError | None:
    if values["model.reference"] in ("start", "base"):
        return None
    return missing_model("model.reference", values["model.reference"])


def training_data_exists(values: Values) -> ConfigError | None:
    return missing_source("data.train", values["data.train"], local=values["choice.data"] == "local")


def held_out_data_exists(values: Values) -> ConfigError | None:
    return missing_source("data.eval", values["data.eval"], local=values["choice.data"] == "local")


def problems_exist(values: Values) -> ConfigError | None:
    return missing_path("eval.task.problems", values["eval.task.problems"], local=True)


def verifier_is_known(key: str, values: Values) -> ConfigError | None:
    name = values[key]
    if name is None or name in _VERIFIERS or "." in name:
        return None
    return ConfigError(
        f"There is no verifier {name}.",
        where=key,
        hint=f"{suggest_choice(name, _VERIFIERS)}, or a function of yours as package.module.function",
    )


def held_out_data_is_named_once(values: Values) -> ConfigError | None:
    if values["data.eval"] is None or not values["data.eval_fraction"]:
        return None
    return ConfigError(
        "data.eval names the held-out data, and data.eval_fraction would hold out training rows as well.",
        where="data.eval_fraction",
        hint="leave one of the two out",
    )


def generator_prompts_exist(values: Values) -> ConfigError | None:
    return missing_source("data.generator", values["data.generator"], local=values["choice.data"] == "local")


def generator_has_prompts(values: Values) -> ConfigError | None:
    """Of a loss with a generator; one of the user's own is asked when it is imported."""
    named, share = values["data.generator"], values["data.generator_fraction"]
    if named is not None and share:
        return ConfigError(
            "data.generator names the generator's prompts, and data.generator_fraction takes training prompts as well.",
            where="data.generator_fraction",
            hint="data.generator_fraction=0, or leave data.generator out",
        )
    if named is not None or share:
        return None
    return ConfigError(
        "The generator has no prompts.",
        where="data.generator_fraction",
        hint="data.generator_fraction=0.2, or data.generator=FILE of prompts and ground truths",
    )


def generator_has_a_loss(values: Values) -> ConfigError | None:
    loss = values["loss._target_"]
    named, share = values["data.generator"], values["data.generator_fraction"]
    if loss == "dpo_cli.losses.pdpo.pdpo_loss" or not str(loss).startswith("dpo_cli.losses.") or not (named or share):
        return None
    return ConfigError(
        "The data name prompts for a generator, and this loss has none.",
        where="data.generator" if named else "data.generator_fraction",
        hint="loss=pdpo (loss.gamma=0 is DPO on the same pairs), or leave them out",
    )


def others_to_compare_with(values: Values) -> ConfigError | None:
    if values["loss.baseline"] != "leave_one_out" or values["loss.generator"] != "policy_gradient":
        return None
    if values["rollout.samples_per_prompt"] > 1:
        return None
    return ConfigError(
        "loss.baseline=leave_one_out compares a sample with the others of its prompt, and there is one.",
        where="rollout.samples_per_prompt",
        hint="rollout.samples_per_prompt=4, or loss.baseline=truth",
    )


def findings_are_looked_for(values: Values) -> ConfigError | None:
    unknown = [name for name in values["health.stop_on"] if name not in FINDINGS]
    if unknown:
        hint = suggest_choice(unknown[0], FINDINGS)
        return ConfigError(f"There is no finding {unknown[0]}.", where="health.stop_on", hint=hint)
    if values["health.enabled"] or not values["health.stop_on"]:
        return None
    return ConfigError(
        "health.stop_on names findings that end the run, and health.enabled=false looks for none.",
        where="health.stop_on",
        hint="health.enabled=true or health.stop_on=[]",
    )


def resume_stands_alone(values: Values) -> ConfigError | None:
    if values["resume"] is None:
        return None
    return ConfigError(
        "resume is set in a file; it names one run and belongs on the command line.",
        where="resume",
        hint=f"dpo-train resume={values['resume']}",
    )


CHECKS: tuple[Check, ...] = (
    (rows_fit_a_microbatch, ("data.max_tokens", "tokens_per_microbatch")),
    (training_ends, ("epochs", "max_steps")),
    (findings_are_looked_for, ("health.enabled", "health.stop_on")),
    (warmup_ends, ("optimizer.warmup_steps", "max_steps")),
    (adapter_names_its_reference, ("model.adapter", "model.reference")),
    (base_reference_has_an_adapter, ("model.adapter", "model.reference")),
    (reference_free_has_no_reference, ("loss.reference_free", "model.reference")),
    (divergence_has_a_reference, ("loss.f_divergence", "loss.reference_free")),
    (template_has_fields, ("data.prompt_template",)),
    *MACHINE_CHECKS,
    *LOGGER_CHECKS,
    (model_exists, ("model.path", "choice.model")),
    (adapter_exists, ("model.adapter",)),
    (reference_exists, ("model.reference",)),
    (training_data_exists, ("data.train", "choice.data")),
    (held_out_data_exists, ("data.eval", "choice.data")),
    (problems_exist, ("eval.task.problems",)),
    (partial(verifier_is_known, "eval.task.verifier"), ("eval.task.verifier",)),
    (generator_prompts_exist, ("data.generator", "choice.data")),
    (generator_has_prompts, ("loss.generator", "data.generator", "data.generator_fraction")),
    (generator_has_a_loss, ("loss._target_", "data.generator", "data.generator_fraction")),
    (others_to_compare_with, ("loss.baseline", "loss.generator", "rollout.samples_per_prompt")),
    (resume_stands_alone, ("resume",)),
)


def missing_source(key: str, value: Any, *, local: bool) -> ConfigError | None:
    entries = value if isinstance(value, list | tuple) else [value]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return next((problem for path in paths if (problem := missing_path(key, path, local=local))), None)


def missing_model(key: str, path: Any, *, local: bool = False) -> ConfigError | None:
    problem = missing_path(key, path, local=local)
    if problem is None and isinstance(path, str) and path and Path(resolve_path(path)).expanduser().is_file():
        return ConfigError(f"{path} is a file; a model is a folder.", where=key, hint=f"{key}={Path(path).parent}")
    return problem


def missing_path(key: str, path: Any, *, local: bool) -> ConfigError | None:
    """A problem when `path` can only mean a file or folder of this machine and there is none.

    local: a bare name, which could be one on the hub, means a file here; `owner/name` may be on the hub in any case.
    """
    if not isinstance(path, str) or not path or "://" in path.removeprefix(PACKAGE_SCHEME):
        return None
    file = Path(resolve_path(path)).expanduser()
    if file.exists() or any(character in path for character in "*?["):  # the data room expands patterns
        return None
    looks_local = path.startswith((".", "/", "~", PACKAGE_SCHEME)) or path.endswith(FILE_ENDINGS)
    if not looks_local and _HUB_NAME.fullmatch(path) and ("/" in path or not local):
        return None
    if path.startswith(PACKAGE_SCHEME):
        return ConfigError(
            f"{path} is missing from the installed package.", where=key, hint=f"install it again: {file}"
        )
    neighbours = [item.name for item in file.parent.iterdir()] if file.parent.is_dir() else []
    found = closest(file.name, neighbours)
    return ConfigError(
        f"There is no file or folder {path}.",
        where=key,
        hint=f"did you mean {file.with_name(found)}?" if found else f"relative paths start at {Path.cwd()}",
    )
