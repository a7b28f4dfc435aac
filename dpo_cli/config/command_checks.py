"""Settings of the commands beside dpo-train that cannot stand together, or name files that are not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.check import Rules
from dpo_cli.config.commands import (
    ChatConfig,
    ConvertConfig,
    DataCheckConfig,
    EvalConfig,
    SampleConfig,
    names_a_file,
    run_settings_file,
)
from dpo_cli.config.contradictions import (
    CHECKS,
    adapter_exists,
    missing_model,
    missing_path,
    missing_source,
    model_exists,
    reference_exists,
    template_has_fields,
    training_data_exists,
    verifier_is_known,
)
from dpo_cli.config.keys import fields_of, known_keys
from dpo_cli.config.machine_checks import Check, Values, nvme_has_a_place, workers_need_deepspeed
from dpo_cli.config.schema import Config
from dpo_cli.config.shipped import COMMAND_GROUPS, GROUPS
from dpo_cli.config.suggest import suggest_choice
from dpo_cli.data.reasons import FINDINGS, REASONS
from dpo_cli.errors import ConfigError

CONVERT_ENDINGS = (".jsonl", ".parquet")
# `beside` that means the model a run was trained against.
BESIDE_REFERENCE = "reference"


def _is_free(key: str, values: Values) -> ConfigError | None:
    """Nothing is ever written over."""
    if values[key] is None:
        return None
    path = Path(values[key])
    if path.exists():
        return ConfigError(f"{path} is there already, and nothing is written over.", where=key, hint=f"{key}=ANOTHER")
    blocked = next((parent for parent in path.absolute().parents if parent.exists()), None)
    if blocked is not None and not blocked.is_dir():
        return ConfigError(f"{blocked} is a file, so {path} cannot be made in it.", where=key)
    return None


def _prompts_exist(values: Values) -> ConfigError | None:
    return missing_source("prompts", values["prompts"], local=True)


def _data_exist(values: Values) -> ConfigError | None:
    return missing_source("data", values["data"], local=True)


def _sampling_varies(values: Values) -> ConfigError | None:
    samples = values["sampling.samples_per_prompt"]
    if samples == 1 or values["sampling.temperature"] > 0:
        return None
    return ConfigError(
        f"At temperature 0 all {samples} samples of a prompt are the same one.",
        where="sampling.temperature",
        hint="sampling.temperature=1 or sampling.samples_per_prompt=1",
    )


def _template_has_fields(values: Values) -> ConfigError | None:
    template = values["prompt_template"]
    if template is None or "{" in template:
        return None
    return ConfigError(
        "prompt_template names no column, so every prompt would be the same.",
        where="prompt_template",
        hint="'prompt_template=Question: {question}\\n\\nAnswer: '",
    )


def _rewards_have_a_reference(values: Values) -> ConfigError | None:
    """Asked only where implicit rewards are wanted."""
    if not isinstance(values["model.path"], str) or run_settings_file(values["model.path"]) is not None:
        return None
    if values["model.reference"] in (None, "start"):
        return ConfigError(
            "Implicit rewards compare the policy with a reference, and none is named.",
            where="model.reference",
            hint="model.reference=FOLDER, the model that training began with; a run in model.path knows its own",
        )
    if values["beta"] is None:
        return ConfigError("Implicit rewards need their scale.", where="beta", hint="beta=0.1")
    return None


def _pairs_have_what_they_need(values: Values) -> ConfigError | None:
    kind, samples, chosen = values["pairs"], values["sampling.samples_per_prompt"], values["chosen"]
    if kind is None:
        for key in ("chosen", "samples_out"):
            if values[key] is not None:
                return ConfigError(f"{key} is for pairs, and none are made.", where=key, hint="pairs=verified")
        return None
    if kind == "verified" and values["verifier"] is None:
        return ConfigError(
            "pairs=verified sets right samples against wrong ones, and no verifier says which is which.",
            where="verifier",
            hint="verifier=gsm8k",
        )
    if kind == "best_worst" and chosen is not None:
        return ConfigError(
            "pairs=best_worst takes chosen responses from the samples.", where="chosen", hint="pairs=verified"
        )
    if samples < 2 and chosen is None:
        return ConfigError(
            "A pair needs two samples of a prompt.",
            where="sampling.samples_per_prompt",
            hint="sampling.samples_per_prompt=4",
        )
    return _rewards_have_a_reference(values) if kind == "best_worst" else None


def _outputs_differ(values: Values) -> ConfigError | None:
    if values["samples_out"] is None or Path(values["samples_out"]).absolute() != Path(values["out"]).absolute():
        return None
    return ConfigError("out and samples_out are the same file.", where="samples_out", hint="samples_out=ANOTHER")


def _chosen_file_exists(values: Values) -> ConfigError | None:
    chosen = values["chosen"]
    return missing_path("chosen", chosen, local=True) if isinstance(chosen, str) and names_a_file(chosen) else None


def _mode_has_its_input(values: Values) -> ConfigError | None:
    mode = values["mode"]
    needed = {"task": "prompts", "preferences": "data", "rewards": "data"}.get(mode)
    if needed is not None and values[needed] is None:
        return ConfigError(f"mode={mode} needs {needed}.", where=needed, hint=f"{needed}=FILE")
    other = {"prompts": "data", "data": "prompts"}.get(needed or "")
    if other is not None and values[other] is not None:
        hint = "mode=task" if other == "prompts" else "mode=preferences"
        return ConfigError(f"mode={mode} does not read {other}.", where=other, hint=f"{hint}, or leave {other} out")
    if mode == "rewards" and values["out"] is None:
        return ConfigError("mode=rewards writes a file.", where="out", hint="out=rewards.jsonl")
    return None


def _mode_has_its_reference(values: Values) -> ConfigError | None:
    return _rewards_have_a_reference(values) if values["mode"] in ("preferences", "rewards") else None


def _what_is_compared_exists(values: Values) -> ConfigError | None:
    mode, named = values["mode"], values["compare"]
    named = [named] if isinstance(named, str) else named
    wanted = {"task": (0, 1), "compare": (2,)}.get(mode, (0,))
    if len(named) not in wanted:
        return ConfigError(
            f"mode={mode} compares {' or '.join(map(str, wanted))} others, and compare names {len(named)}.",
            where="compare",
            hint="mode=compare compare=[a.json,b.json], or with mode=task compare=FOLDER",
        )
    local = mode == "compare"
    return next((problem for name in named if (problem := missing_path("compare", name, local=local))), None)


def _enough_samples(values: Values) -> ConfigError | None:
    samples = values["sampling.samples_per_prompt"]
    for key in ("pass_at", "maj_at"):
        counts = values[key] if isinstance(values[key], list) else [values[key]]
        if counts and max(counts) > samples:
            return ConfigError(
                f"{key} asks for {max(counts)} samples of a question, and {samples} are drawn.",
                where=key,
                hint=f"sampling.samples_per_prompt={max(counts)} sampling.temperature=1",
            )
    return None


def _findings_are_known(values: Values) -> ConfigError | None:
    named = values["fail_on"] if isinstance(values["fail_on"], list) else [values["fail_on"]]
    known = (*FINDINGS, *REASONS)
    unknown = next((name for name in named if name not in known), None)
    if unknown is None:
        return None
    return ConfigError(f"There is no finding {unknown}.", where="fail_on", hint=suggest_choice(unknown, known))


def _form_is_known(values: Values) -> ConfigError | None:
    if values["out"].endswith(CONVERT_ENDINGS):
        return None
    return ConfigError(
        f"The form of {values['out']} is not known by its ending.",
        where="out",
        hint=f"out=pairs.jsonl; known endings: {', '.join(CONVERT_ENDINGS)}",
    )


def _beside_is_there(values: Values) -> ConfigError | None:
    beside, reference = values["beside"], values["model.reference"]
    if beside != BESIDE_REFERENCE:
        return missing_model("beside", beside)
    knows = isinstance(values["model.path"], str) and run_settings_file(values["model.path"]) is not None
    if knows or reference not in (None, "start"):
        return None
    return ConfigError(
        "model.path names no run that would know its reference.",
        where="beside",
        hint="beside=FOLDER, the model that training began with",
    )


def _system_has_a_chat(values: Values) -> ConfigError | None:
    if values["system"] is None or values["chat"] is not False:
        return None
    return ConfigError("chat=false knows no system's message.", where="system", hint="chat=true, or leave system out")


def _only(modes: tuple[str, ...], check: Callable[[Values], ConfigError | None], values: Values) -> ConfigError | None:
    return check(values) if values["mode"] in modes else None


_COMMON: tuple[Check, ...] = (
    (adapter_exists, ("model.adapter",)),
    (reference_exists, ("model.reference",)),
    (workers_need_deepspeed, ("hardware.num_workers", "hardware.zero_stage")),
    (nvme_has_a_place, ("hardware.offload_optimizer", "hardware.offload_parameters", "hardware.nvme_path")),
    (partial(verifier_is_known, "verifier"), ("verifier",)),
    (_template_has_fields, ("prompt_template",)),
    (_sampling_varies, ("sampling.samples_per_prompt", "sampling.temperature")),
    (partial(_is_free, "out"), ("out",)),
)
_SAMPLE: tuple[Check, ...] = (
    (model_exists, ("model.path", "choice.model")),
    (_prompts_exist, ("prompts",)),
    (
        _pairs_have_what_they_need,
        (
            "pairs",
            "verifier",
            "chosen",
            "samples_out",
            "sampling.samples_per_prompt",
            "model.path",
            "model.reference",
            "beta",
        ),
    ),
    (_chosen_file_exists, ("chosen",)),
    (partial(_is_free, "samples_out"), ("samples_out",)),
    (_outputs_differ, ("out", "samples_out")),
)
_EVAL: tuple[Check, ...] = (
    (partial(_only, ("task", "preferences", "rewards"), model_exists), ("mode", "model.path", "choice.model")),
    (_prompts_exist, ("prompts",)),
    (_data_exist, ("data",)),
    (_mode_has_its_input, ("mode", "prompts", "data", "out")),
    (_mode_has_its_reference, ("mode", "model.path", "model.reference", "beta")),
    (_what_is_compared_exists, ("mode", "compare")),
    (_enough_samples, ("sampling.samples_per_prompt", "pass_at", "maj_at")),
)


_CHAT: tuple[Check, ...] = (
    (model_exists, ("model.path", "choice.model")),
    (adapter_exists, ("model.adapter",)),
    (reference_exists, ("model.reference",)),
    (_beside_is_there, ("beside", "model.path", "model.reference")),
    (_system_has_a_chat, ("system", "chat")),
    (_template_has_fields, ("prompt_template",)),
)
_CONVERT: tuple[Check, ...] = (
    (training_data_exists, ("data.train", "choice.data")),
    (template_has_fields, ("data.prompt_template",)),
    (_form_is_known, ("out",)),
    (partial(_is_free, "out"), ("out",)),
)


def _known(schema: Any, values: Any) -> list[str]:
    return list(fields_of(schema))


def _known_to_a_check(values: Any) -> list[str]:
    own = DataCheckConfig.model_fields.keys() - Config.model_fields.keys()
    return [*known_keys(values), *sorted(own)]


def _without_a_model(values: Any) -> frozenset[str]:
    """Two files are compared without a model."""
    return frozenset({"model.path"} if values.get("mode") == "compare" else ())


SAMPLE = Rules(SampleConfig, partial(_known, SampleConfig), COMMAND_GROUPS, _COMMON + _SAMPLE)
EVAL = Rules(EvalConfig, partial(_known, EvalConfig), COMMAND_GROUPS, _COMMON + _EVAL, spared=_without_a_model)
DATA_CHECK = Rules(
    DataCheckConfig,
    _known_to_a_check,
    GROUPS,
    (*CHECKS, (_findings_are_known, ("fail_on",)), (partial(_is_free, "out"), ("out",))),
)
CONVERT = Rules(ConvertConfig, partial(_known, ConvertConfig), ("data",), _CONVERT)
CHAT = Rules(ChatConfig, partial(_known, ChatConfig), ("model",), _CHAT)
