"""LoRA: adapters to train, an SFT adapter merged before training, and what both become when they are saved.

Adapters are injected into the model itself, which keeps its class and its scoring. At the start B is zero, so policy
and reference are the same function, bit for bit.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.errors import ModelError
from dpo_cli.policy.folder import adapter_weight_files, check_safetensors_file
from dpo_cli.policy.whole_weights import Gathered, whole_already, whole_state_dict

ADAPTER_NAME = "default"


class LoraSettings(Protocol):
    """rank: of the update, which is scaled by alpha / rank. target_modules: "all-linear" or ends of module names."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def target_modules(self) -> str | Sequence[str]: ...


def add_lora(model: PreTrainedModel, settings: LoraSettings, *, seed: int, base_name: str) -> LoraConfig:
    """Inject trainable float32 adapters (A random by `seed`, B zero) and freeze everything else.

    Returns peft's config of them, which is saved beside the adapter. base_name: the base model as the user named it.
    Raises ModelError when no module matches, or the head or embeddings would be adapted.
    """
    targets = settings.target_modules
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        # A reference compared with a policy under dropout is a comparison with noise.
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    _refuse_head_and_embeddings(model, targets)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # peft warns of patterns it makes itself for mixtures of experts and then finds superfluous.
        warnings.simplefilter("ignore", RuntimeWarning)
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise ModelError(
                f"LoRA found nothing to adapt: {str(error).splitlines()[0]}",
                where="model.lora.target_modules",
                hint='model.lora.target_modules="all-linear"',
            ) from error
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Small enough to be kept in float32, where updates of lr 1e-5 are not lost as in bf16.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            if "lora_" not in name:
                raise ModelError(f"LoRA left {name} trainable.", where="model.lora")
    return config


def _refuse_head_and_embeddings(model: PreTrainedModel, targets: str | Sequence[str]) -> None:
    if isinstance(targets, str):
        if targets == "all-linear":
            return  # peft leaves the output head out
        wanted = re.compile(targets).fullmatch
    else:
        ends = tuple(targets)
        wanted = re.compile("(.*\\.)?(" + "|".join(map(re.escape, ends)) + ")").fullmatch
    untouchable = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if any(module is part for part in untouchable) and wanted(name):
            raise ModelError(
                f"LoRA on {name} is not supported: embeddings and output head are scored as they stand.",
                where="model.lora.target_modules",
                hint=f"leave {name} out",
            )


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """While open, the model computes as it did before `add_lora`."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapter(model: PreTrainedModel, adapter: Path, *, base_name: str) -> PreTrainedModel:
    """Merge a saved peft adapter into the model's weights, in place, and return the model.

    base_name: the base model as the user named it; it must be the one the adapter was trained on.
    Raises ModelError when the adapter is damaged, belongs to another base, or does not fit.
    """
    (weights,) = adapter_weight_files(adapter)
    check_safetensors_file(weights)
    check_adapter_base(adapter, base_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing tensors are an error below
            wrapped = PeftModel.from_pretrained(model, str(adapter), adapter_name=ADAPTER_NAME)
            expected = get_peft_model_state_dict(wrapped, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"The adapter does not fit the model: {error}", where=str(adapter)) from error
    with safe_open(weights, framework="pt") as opened:
        differing = sorted(set(opened.keys()) ^ set(expected))
    if differing:
        raise ModelError(
            f"The adapter does not fit the model: {len(differing)} tensors differ, first {differing[0]}.",
            where=str(adapter),
        )
    merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    # peft leaves its config on the model, and transformers would then save the model as an adapter.
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        merged.__dict__.pop(leftover, None)
    return merged


def check_adapter_base(adapter: Path, base_name: str) -> None:
    """Raise ModelError when the adapter says it was trained on a base of another name than `base_name`."""
    file = adapter / "adapter_config.json"
    try:
        trained_on = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError("The adapter's config cannot be read.", where=str(file)) from error
    if trained_on and _last_part(trained_on) != _last_part(base_name):
        raise ModelError(
            f"The adapter was trained on {trained_on}, and model.path is {base_name}.",
            where=str(file),
            hint=f"model.path={trained_on}; or, if it was only renamed, edit base_model_name_or_path in that file",
        )


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def merged_state_dict(model: nn.Module, gathered: Gathered = whole_already) -> dict[str, Tensor]:
    """The state dict the model would have with its LoRA adapters merged in; the model itself is left alone.

    The update is added in float32 and rounded once, to the dtype of the weight. Everything comes back on the CPU, and
    one weight with its update lives on the device at a time: gathered makes parameters whole while it is open.
    """
    adapted: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # Experts of a mixture are one tensor for all, which peft wraps as a named parameter of their module.
            parameter = getattr(module, "parameter_name", "weight")
            adapted[f"{_without_wrappers(name)}.{parameter}"] = module
    left = dict(adapted)

    def with_update(name: str, weight: Tensor) -> Tensor:
        layer = left.pop(name, None)
        if layer is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + layer.get_delta_weight(ADAPTER_NAME).to(wide)).to(weight.dtype)

    def halves(name: str) -> list[nn.Parameter]:
        return [p for part, p in adapted[name].named_parameters() if "lora_" in part] if name in adapted else []

    merged = whole_state_dict(
        model,
        gathered,
        rename=lambda name: None if ".lora_" in name else _without_wrappers(name),
        companions=halves,
        value=with_update,
    )
    if left:
        raise RuntimeError(f"adapters without a weight to merge into: {sorted(left)}")
    return merged


def _without_wrappers(name: str) -> str:
    """The name a module or weight has without the layers that peft puts around it, nested ones included."""
    return name.replace(".base_layer", "")


def adapter_state_dict(model: nn.Module, gathered: Gathered = whole_already) -> dict[str, Tensor]:
    """The adapter alone on the CPU, under the names peft's own loader expects."""
    suffix = f".{ADAPTER_NAME}.weight"
    return whole_state_dict(
        model,
        gathered,
        rename=lambda name: "base_model.model." + name.replace(suffix, ".weight") if ".lora_" in name else None,
    )
