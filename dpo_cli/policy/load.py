"""Load the policy and, where it is another model, the reference: complete, comparable, and fit for packed rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dpo_cli.errors import ModelError
from dpo_cli.policy.attention import PACKED_ATTENTION
from dpo_cli.policy.attention_routes import AttentionRoute, choose_attention
from dpo_cli.policy.checkpointing import enable_checkpointing
from dpo_cli.policy.compatibility import check_config, check_model_class, check_modules
from dpo_cli.policy.dropout import switch_off_noise, verify_no_noise
from dpo_cli.policy.folder import adapter_weight_files, check_safetensors_file, resolve_model_folder, weight_files
from dpo_cli.policy.packed_model import PackedModel
from dpo_cli.policy.tokenizer import check_same_vocabulary, check_tokenizer_fits, load_tokenizer, stop_token_ids

# peft takes a second to import, and most runs have no adapter: dpo_cli.policy.lora is imported where one is asked for.
if TYPE_CHECKING:
    from peft import LoraConfig

    from dpo_cli.policy.lora import LoraSettings

Reading = Callable[[torch.dtype], AbstractContextManager[None]]


def _plainly(dtype: torch.dtype) -> AbstractContextManager[None]:
    return nullcontext()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Leftovers of older files that no model reads: position tables and masks that are computed today.
_HARMLESS_EXTRA_WEIGHTS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")


class ModelSettings(Protocol):
    """The `model` group of the config, as the schema describes it."""

    @property
    def path(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtype(self) -> str: ...
    @property
    def attention(self) -> str: ...
    @property
    def gradient_checkpointing(self) -> bool: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def offload_checkpoints(self) -> bool: ...
    @property
    def pad_rows_to(self) -> int: ...
    @property
    def trust_remote_code(self) -> bool: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def reference(self) -> str | None: ...
    @property
    def lora(self) -> LoraSettings | None: ...


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be scored, with all that must travel with it.

    folder: where its weights were read from. adapter: the folder of the SFT adapter that was merged in, or None.
    attention: how its packed rows are attended to. pad_rows_to: a multiple of so many tokens.
    stop_token_ids: every token on which its replies end.
    noise_settings: the config's dropout fields before they were set to zero, put back when the model is exported.
    lora: peft's config of the adapters in training, or None. They start at zero: the model's first log-probs, and so
        its identity as a reference, are those without them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    adapter: Path | None
    dtype: torch.dtype
    attention: AttentionRoute
    pad_rows_to: int
    stop_token_ids: frozenset[int]
    noise_settings: dict[str, float]
    lora: LoraConfig | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def packed(self) -> PackedModel:
        """The model as packed rows are scored by."""
        return PackedModel(self.model, attention=self.attention, pad_rows_to=self.pad_rows_to)

    @property
    def identity(self) -> dict[str, Any]:
        """What the starting log-probs depend on: keyword arguments of `reference.identity.model_identity`."""
        return {
            "folder": self.folder,
            "adapter": self.adapter,
            "config": self.model.config.to_dict(),
            "dtype": self.dtype_name,
            "attention_route": self.attention.name,
        }


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The weights' dtype: "auto" is bfloat16 on a GPU and float32 on a CPU, which has no fast bf16 to speak of."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"There is no dtype {name}.", where="model.dtype", hint=f"one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    settings: ModelSettings,
    *,
    device: torch.device,
    seed: int,
    max_tokens: int | None = None,
    reading: Reading = _plainly,
) -> LoadedModel:
    """The policy at its start: base weights, the SFT adapter merged in, new LoRA adapters injected, as asked.

    seed: of LoRA's random half. max_tokens: the longest prompt + response, where it is known. reading: entered while
    weights of a dtype are read.
    Raises ModelError for whatever would fail or mislead later.
    """
    loaded = _load_start(settings, device=device, max_tokens=max_tokens, reading=reading)
    if settings.lora is not None:
        from dpo_cli.policy.lora import add_lora

        config = add_lora(loaded.model, settings.lora, seed=seed, base_name=settings.path)
        loaded = replace(loaded, lora=config)
    if settings.gradient_checkpointing:
        enable_checkpointing(
            loaded.model,
            every=settings.checkpoint_every,
            # Beside a CPU they are on the host already.
            offload=settings.offload_checkpoints and device.type == "cuda",
        )
    loaded.model.train()
    return loaded


def load_reference(
    settings: ModelSettings,
    policy: LoadedModel,
    *,
    device: torch.device,
    max_tokens: int | None = None,
    reading: Reading = _plainly,
) -> LoadedModel | None:
    """The reference where it is another model than the policy at its start, frozen; None where it is that policy.

    A folder that holds an adapter names the base with that adapter merged in. A reference without a tokenizer of its
    own is taken to have the policy's.
    """
    name = settings.reference
    if name is None and settings.adapter is not None:
        raise ModelError(
            "With an SFT adapter the reference must be named.",
            where="model.reference",
            hint="model.reference=start (base with the adapter) or model.reference=base (without it)",
        )
    if name in (None, "start"):
        return None
    path, revision, adapter = (settings.path, settings.revision, None) if name == "base" else (str(name), None, None)
    if name != "base" and (resolve_model_folder(path) / "adapter_config.json").is_file():
        path, revision, adapter = settings.path, settings.revision, path
    loaded = _load(
        settings,
        path,
        revision,
        adapter,
        device=device,
        max_tokens=max_tokens,
        fallback_tokenizer=policy.tokenizer,
        reading=reading,
    )
    check_same_vocabulary(policy.tokenizer, loaded.tokenizer, where=str(loaded.folder))
    return _frozen(loaded)


def load_frozen_start(
    settings: ModelSettings, *, device: torch.device, max_tokens: int | None = None, reading: Reading = _plainly
) -> LoadedModel:
    """The policy at its start, frozen: base weights, the SFT adapter merged in. Arguments, errors: see `load_model`."""
    return _frozen(_load_start(settings, device=device, max_tokens=max_tokens, reading=reading))


def _frozen(loaded: LoadedModel) -> LoadedModel:
    loaded.model.requires_grad_(False)
    loaded.model.eval()
    return loaded


def _load_start(
    settings: ModelSettings, *, device: torch.device, max_tokens: int | None, reading: Reading
) -> LoadedModel:
    return _load(
        settings,
        settings.path,
        settings.revision,
        settings.adapter,
        device=device,
        max_tokens=max_tokens,
        reading=reading,
    )


def _load(
    settings: ModelSettings,
    path: str,
    revision: str | None,
    adapter: str | None,
    *,
    device: torch.device,
    max_tokens: int | None,
    fallback_tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading,
) -> LoadedModel:
    trust = settings.trust_remote_code
    folder = resolve_model_folder(path, revision, trust_remote_code=trust)
    adapter_folder = None if adapter is None else resolve_model_folder(adapter)
    weights = weight_files(folder)
    adapter_weights = [] if adapter_folder is None else adapter_weight_files(adapter_folder)
    for file in (*weights, *adapter_weights):
        check_safetensors_file(file)
    dtype = choose_dtype(settings.dtype, device)

    config = _read_config(folder, trust_remote_code=trust)
    check_config(config, where=str(folder), max_tokens=max_tokens)
    noise_settings = switch_off_noise(config)
    attention = choose_attention(settings.attention, config, device=device, dtype=dtype)
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    except ModelError:
        if fallback_tokenizer is None:
            raise
        tokenizer = fallback_tokenizer

    # An adapter is merged into whole weights; they are partitioned afterwards.
    with reading(dtype) if adapter_folder is None else _plainly(dtype):
        model = _read_weights(folder, config, dtype, trust_remote_code=trust)
    check_modules(model, where=str(folder))
    check_tokenizer_fits(tokenizer, model, where=str(folder))
    if adapter_folder is not None:
        from dpo_cli.policy.lora import merge_adapter

        model = merge_adapter(model, adapter_folder, base_name=path)
    verify_no_noise(model, where=str(folder))
    model = model.to(device)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        adapter=adapter_folder,
        dtype=dtype,
        attention=attention,
        pad_rows_to=settings.pad_rows_to,
        stop_token_ids=stop_token_ids(tokenizer, model.generation_config),
        noise_settings=noise_settings,
    )


def _read_config(folder: Path, *, trust_remote_code: bool) -> Any:
    if not (folder / "config.json").is_file():
        raise ModelError("This model folder has no config.json.", where=str(folder))
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged JSON, unknown types and failed validation come as many kinds
        asks_for_code = "trust_remote_code" in str(error)
        raise ModelError(
            "This model is defined by code in its own folder, which is only run when you ask for it."
            if asks_for_code
            else f"The model's config cannot be read: {_first_line(error)}",
            where=str(folder / "config.json"),
            hint="model.trust_remote_code=true, if you trust its authors" if asks_for_code else None,
        ) from error


def _read_weights(folder: Path, config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    known: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if known is not None:
        check_model_class(known[0] if isinstance(known, tuple) else known, where=str(folder))
    elif not trust_remote_code:
        raise ModelError(f"A {config.model_type} is not a causal language model.", where=str(folder / "config.json"))
    try:
        with quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=PACKED_ATTENTION,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                # Reported like the others, by name, instead of by a message that points to a log.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"The model cannot be loaded: {_first_line(error)}", where=str(folder)) from error
    model: PreTrainedModel = loaded[0]
    check_model_class(type(model), where=str(folder))
    _check_complete(loaded[1], folder)
    return model


def _check_complete(report: dict[str, Any], folder: Path) -> None:
    """A layer that the files do not fill is left at random, and one they fill in vain is lost on export: both stop."""
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.endswith(_HARMLESS_EXTRA_WEIGHTS))
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for names, what in (
        (missing, "are not in the weight files and would be random"),
        (mismatched, "have another shape in the weight files than the config says"),
        (unexpected, "are in the weight files and have no place in the model"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{len(names)} weights {what}: {', '.join(names[:3])}{more}.",
                where=str(folder),
                hint="config.json and the weight files belong to different models, or a shard is missing",
            )
    if report["error_msgs"]:
        raise ModelError(f"The model cannot be loaded: {report['error_msgs'][0]}", where=str(folder))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Progress bars and warnings of transformers are dropped: whatever they would say of weights is an error here."""
    logger = transformers_logging.get_logger("transformers")
    level, bars = logger.level, transformers_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
