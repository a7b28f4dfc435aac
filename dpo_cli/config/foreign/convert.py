"""From a file of another trainer to one that dpo-train reads, with a list of what has no counterpart."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.config.foreign.dialects import AXOLOTL, DIALECTS, LEFT_OUT, LOSS_PARAMETERS, LOSSES, NEEDLESS, Dialect
from dpo_cli.config.secrets import without_secrets
from dpo_cli.config.shipped import CONF_FOLDER
from dpo_cli.errors import ConfigError

# Common names that are ours under another name, value and all.
_PLAIN = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "num_train_epochs": "epochs",
    "seed": "seed",
    "output_dir": "run_dir",
    "max_length": "data.max_tokens",
    "dataset_num_proc": "data.workers",
    "dataset_config": "data.subset",
    "dataset_train_split": "data.split",
    "ref_model": "model.reference",
}
_FLOATS = {"optimizer.lr", "optimizer.weight_decay", "optimizer.eps"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}


@dataclass
class Conversion:
    """choices: of our groups. values: by dotted key. left: what was not carried over, and what there is instead."""

    dialect: Dialect
    choices: dict[str, str] = field(default_factory=lambda: {"model": "local", "data": "local"})
    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def text(self, source: str) -> str:
        """The YAML file, whose head says what it came from and what is not in it."""
        head = [f"# From {source}, a configuration of {self.dialect.name}."]
        head += ["# Not carried over:", *(f"#   {line}" for line in self.left)] if self.left else []
        defaults = ["config", *({f"override {group}": choice} for group, choice in self.choices.items()), "_self_"]
        nested: dict[str, Any] = {}
        for key, value in self.values.items():
            section = nested
            *path, leaf = key.split(".")
            for name in path:
                section = section.setdefault(name, {})
            section[leaf] = value
        body = yaml.safe_dump({"defaults": defaults, **nested}, sort_keys=False, allow_unicode=True, width=120)
        return "\n".join([*head, body])


def dialect_of(settings: Mapping[str, Any]) -> Dialect:
    """Raises ConfigError where no key tells whose file this is."""
    found = max(DIALECTS, key=lambda dialect: len(dialect.marks & settings.keys()))
    if not found.marks & settings.keys():
        raise ConfigError(
            "This file has no key by which a configuration of TRL, LLaMA-Factory or axolotl is known.",
            hint="it should be what `trl dpo --config`, `llamafactory-cli train` or `axolotl train` reads",
        )
    return found


def read_foreign(file: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file. Raises ConfigError where it is neither."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The file cannot be read: {error}.", where=str(file)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"This is no YAML: {str(error).splitlines()[0]}.", where=str(file)) from None
    if not isinstance(settings, dict):
        raise ConfigError("The file holds no keys and values.", where=str(file))
    return settings


def convert(settings: Mapping[str, Any], *, gpus: int, folder: Path) -> Conversion:
    """settings: of the file. gpus: on how many it was run, all machines together. folder: where its paths begin."""
    dialect = dialect_of(settings)
    asked = {key: value for key, value in settings.items() if value is not None and value != ""}
    if dialect.name == "axolotl" and asked.get("rl") == "dpo" and "dpo_loss_type" in asked:
        asked["rl"] = asked.pop("dpo_loss_type")
    given = {dialect.renamed.get(key, key): value for key, value in asked.items()}
    common = {**dialect.defaults, **given}
    done = Conversion(dialect)
    if settings.get("stage") == "kto":
        common["loss_type"] = "kto"
    if settings.get("disable_gradient_checkpointing"):
        common["gradient_checkpointing"] = False
    taken = {"rl", "loss_type", "loss_weights", "disable_gradient_checkpointing", *LOSS_PARAMETERS}
    taken |= _model(common, done)
    taken |= _data(common, done, folder)
    _loss(common, given, done)
    taken |= _optimizer(common, done)
    taken |= _steps(common, done, gpus)
    taken |= _hardware(common, done, gpus, folder)
    for key in common:
        if key in _PLAIN:
            value = common[key]
            done.values[_PLAIN[key]] = float(value) if _PLAIN[key] in _FLOATS else value
            taken.add(key)
    if common.get("max_steps", -1) > 0:
        done.values["epochs"] = None
    if done.values["data.max_tokens"] > 8192:
        done.values["tokens_per_microbatch"] = done.values["data.max_tokens"]
    for key in sorted(given.keys() - taken - NEEDLESS):
        if given[key] is not False and given[key] != 0:
            # Such files hold tokens now and then, as hub_token.
            told = _short(without_secrets({key: given[key]})[key])
            done.left.append(f"{key}={told}: {LEFT_OUT.get(key, 'there is no such key here')}")
    return done


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _model(common: Mapping[str, Any], done: Conversion) -> set[str]:
    adapters = common.get("use_peft") or common.get("finetuning_type") == "lora"
    adapters = adapters or common.get("adapter") in ("lora", "qlora")
    if adapters and "lora_r" in common:
        rank = int(common["lora_r"])
        done.values["model.lora.rank"] = rank
        # LLaMA-Factory's own default is twice the rank.
        done.values["model.lora.alpha"] = common.get("lora_alpha", 2 * rank)
        targets = common.get("lora_target_modules", "all-linear")
        if isinstance(targets, str) and targets not in ("all", "all-linear"):
            targets = [name.strip() for name in targets.split(",")]
        whole = targets in ("all", "all-linear") or common.get("lora_target_linear")
        done.values["model.lora.target_modules"] = "all-linear" if whole else targets
    if common.get("adapter") == "qlora":
        done.left.append(f"adapter=qlora: {LEFT_OUT['load_in_4bit']}")
    if "sft_adapter" in common:
        done.values["model.adapter"] = common["sft_adapter"]
        done.values.setdefault("model.reference", "start")
        done.left.append(
            "the reference of a run that begins with an adapter: taken to be the base with it, model.reference=start; "
            "elsewhere it may have been the bare base, model.reference=base"
        )
    return {"sft_adapter", "lora_r", "lora_alpha", "lora_target_modules", "lora_target_linear", "adapter"}


def _data(common: Mapping[str, Any], done: Conversion, folder: Path) -> set[str]:
    values = done.values
    values["data.train"] = "???"
    values["data.eval_fraction"] = 0
    if "dataset_name" in common:
        values["data.train"] = common["dataset_name"]
        if common.get("eval_strategy") != "no":
            values["data.eval_split"] = common.get("dataset_test_split", "test")
    elif "datasets" in common:
        values["data.train"] = _axolotl_sources(common["datasets"], done)
        if common.get("test_datasets"):
            values["data.eval"] = _axolotl_sources(common["test_datasets"], done)
    elif "dataset" in common:
        values["data.train"] = _registered(common["dataset"], common, done, folder)
        if "eval_dataset" in common:
            values["data.eval"] = _registered(common["eval_dataset"], common, done, folder)
    share = common.get("held_out_share", 0)
    if 0 < share < 1:
        values["data.eval_fraction"] = share
    elif share:
        done.left.append(f"{share} held-out rows: data.eval_fraction is a share, data.eval a file")
    return {
        "dataset_name",
        "dataset_test_split",
        "datasets",
        "test_datasets",
        "dataset",
        "eval_dataset",
        "dataset_dir",
        "held_out_share",
    }


def _axolotl_sources(entries: Any, done: Conversion) -> list[Any]:
    sources = []
    for entry in entries:
        path = entry.get("data_files", entry["path"]) if entry["path"] in ("json", "csv", "parquet") else entry["path"]
        source = {"path": path[0] if isinstance(path, list) else path}
        source |= {key: entry[key] for key in ("split", "name") if entry.get(key)}
        sources.append(source if len(source) > 1 else source["path"])
    if any(entry.get("type") for entry in entries):
        done.left.append("datasets.type: rows are recognised by their columns; see what dpo-data says")
    return sources


def _registered(names: Any, common: Mapping[str, Any], done: Conversion, folder: Path) -> Any:
    """LLaMA-Factory's data sets go by the names of dataset_info.json."""
    listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    registry = folder / common.get("dataset_dir", "data") / "dataset_info.json"
    known = json.loads(registry.read_text(encoding="utf-8")) if registry.is_file() else {}
    found = []
    for name in listed:
        entry = known.get(name, {})
        if "file_name" in entry:
            found.append(str(registry.parent / entry["file_name"]))
        elif "hf_hub_url" in entry:
            found.append(entry["hf_hub_url"])
        else:
            done.left.append(f"dataset {name}: it is not in {registry}; name its file or hub name as data.train")
    return "???" if len(found) < len(listed) else found


def _loss(common: Mapping[str, Any], given: Mapping[str, Any], done: Conversion) -> None:
    kinds = common.get("loss_type", "sigmoid")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [kind for kind in kinds if kind not in LOSSES]
    for kind in unknown:
        done.left.append(f"loss {kind}: there is no such loss here; docs/losses.md lists those there are")
    kinds = [kind for kind in kinds if kind in LOSSES] or ["sigmoid"]
    if kinds == ["robust"]:
        common = {"label_smoothing": 0.0, **common}
    if kinds == ["simpo"] and done.dialect is AXOLOTL:
        # Its trainer is TRL's CPOTrainer, which imitates as well unless told otherwise.
        common = {"simpo_gamma": 0.5, "nll_alpha": 1.0, **common}
    choice, fixed = LOSSES[kinds[0]] if len(kinds) == 1 else ("mix", {})
    done.choices["loss"] = choice
    parameters = yaml.safe_load((CONF_FOLDER / "loss" / f"{choice}.yaml").read_text(encoding="utf-8"))
    for name, value in fixed.items():
        done.values[f"loss.{name}"] = value
    if choice == "mix":
        weights = common.get("loss_weights") or [1.0] * len(kinds)
        done.values["loss.losses"] = [
            {"loss": LOSSES[kind][0], "weight": float(weight), **LOSSES[kind][1]}
            for kind, weight in zip(kinds, weights, strict=True)
        ]
    for name, ours in LOSS_PARAMETERS.items():
        # An option of another loss means nothing, and a default of the dialect is not worth a word.
        if name in common and ours in parameters:
            done.values[f"loss.{ours}"] = _number(common[name])
        elif given.get(name):
            done.left.append(f"{name}={_short(given[name])}: loss={choice} has no such parameter")


def _number(value: Any) -> Any:
    """YAML reads 1e-1 as text, and a whole number where a fraction is meant."""
    try:
        return value if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return value


def _optimizer(common: Mapping[str, Any], done: Conversion) -> set[str]:
    kind = str(common.get("optim", "adamw_torch"))
    if kind.startswith("rmsprop"):
        done.choices["optimizer"] = "rmsprop"
    elif "adamw" not in kind:
        done.left.append(f"optim={kind}: adamw and rmsprop are there; adamw was taken")
    if "adamw" in kind and "8bit" in kind:
        done.values["optimizer.state_bits"] = 8
    schedule = str(common.get("lr_scheduler_type", "linear"))
    if schedule not in _SCHEDULES:
        done.left.append(f"lr_scheduler_type={schedule}: linear, cosine and constant are there; cosine was taken")
    done.values["optimizer.schedule"] = _SCHEDULES.get(schedule, "cosine")
    norm = float(common.get("max_grad_norm", 1.0))
    done.values["optimizer.max_grad_norm"] = norm or None
    if done.choices.get("optimizer") != "rmsprop" and {"adam_beta1", "adam_beta2"} & common.keys():
        done.values["optimizer.betas"] = [common.get("adam_beta1", 0.9), common.get("adam_beta2", 0.999)]
    if "cosine_min_lr_ratio" in common:
        done.values["optimizer.final_lr_fraction"] = common["cosine_min_lr_ratio"]
    return {"optim", "lr_scheduler_type", "max_grad_norm", "adam_beta1", "adam_beta2", "cosine_min_lr_ratio"}


def _steps(common: Mapping[str, Any], done: Conversion, gpus: int) -> set[str]:
    values = done.values
    values["global_pairs"] = common["per_device_train_batch_size"] * common["gradient_accumulation_steps"] * gpus
    steps = common.get("max_steps", -1)
    if steps > 0:
        values["max_steps"] = steps
    taken = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "warmup_steps"}
    warmup, share = common.get("warmup_steps"), common.get("warmup_ratio", 0)
    if warmup is not None and 0 < warmup < 1:  # transformers 5 reads a share there
        warmup, share = 0, warmup
    if share and steps > 0:
        warmup = round(share * steps)
        taken.add("warmup_ratio")
    elif share:
        warmup = None
        if "warmup_ratio" not in common:
            done.left.append(f"warmup_steps={share}: {LEFT_OUT['warmup_ratio']}")
    if warmup is not None:
        values["optimizer.warmup_steps"] = 0 if common.get("lr_scheduler_type") == "constant" else int(warmup)
    for key, ours in (("logging_steps", "log_every"), ("save_steps", "save_every"), ("eval_steps", "eval_every")):
        every = common.get(key)
        if every is not None and every >= 1:
            values[ours] = int(every)
            taken.add(key)
    if common.get("save_total_limit", 0) >= 1:
        values["keep_checkpoints"] = common["save_total_limit"]
        taken.add("save_total_limit")
    for key, ours in (("save_strategy", "save_every"), ("eval_strategy", "eval_every")):
        if common.get(key) == "no":
            values[ours] = 0
        elif common.get(key) == "epoch":
            done.left.append(f"{key}=epoch: it is counted in steps here, {ours}")
    if "sync_ref_model" in common and common.get("ref_model_mixup_alpha", 0.6) == 1:
        values["model.reference_sync_steps"] = common.get("ref_model_sync_steps", 512)
        taken |= {"sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"}
    return taken


def _hardware(common: Mapping[str, Any], done: Conversion, gpus: int, folder: Path) -> set[str]:
    stage = None
    if common.get("fsdp"):
        stage = 3
        done.left.append("fsdp: DeepSpeed's ZeRO-3 partitions the same things, hardware=deepspeed_zero3")
    named = common.get("deepspeed")
    if named:
        stage = _stage_of(named, folder)
        if stage is None:
            done.left.append(f"deepspeed={_short(named)}: its stage is not known; hardware=deepspeed_zero2 was taken")
            stage = 2
    if stage is None and gpus > 1:
        stage = 1
    if stage is not None and done.values.pop("optimizer.state_bits", None):
        done.left.append("optim of 8 bits: ZeRO does not partition it; 32 bits, divided over the ranks, were taken")
    if stage is not None:
        done.choices["hardware"] = f"deepspeed_zero{max(stage, 1)}"
    return {"fsdp", "deepspeed"}


def _stage_of(named: Any, folder: Path) -> int | None:
    """Of a DeepSpeed configuration: a file, by its content or its name, or the settings themselves."""
    if isinstance(named, Mapping):
        stage = named.get("zero_optimization", {}).get("stage")
        return stage if isinstance(stage, int) else None
    file = folder / str(named)
    if file.is_file():
        return _stage_of(read_foreign(file), folder)
    told = re.search(r"(?:zero|z|stage)[-_]?([0-3])", str(named))
    return int(told.group(1)) if told else None
