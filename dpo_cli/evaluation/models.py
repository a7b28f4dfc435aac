"""Which models are meant: a folder, a hub name, or a run of dpo-train, whose final model and reference are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.config.commands import RUN_REQUEST, run_settings_file
from dpo_cli.config.schema import ModelConfig
from dpo_cli.engine.backend import Backend
from dpo_cli.errors import ConfigError, ModelError
from dpo_cli.paths import resolve_path
from dpo_cli.policy.load import LoadedModel, load_frozen_start, load_reference
from dpo_cli.policy.tokenizer import check_same_vocabulary
from dpo_cli.train.final import FINAL


@dataclass(frozen=True)
class NamedModel:
    """settings: what is loaded. shown: its name on the screen. run: the settings of the run it is of, or None."""

    settings: ModelConfig
    shown: str
    run: dict[str, Any] | None

    def beta(self, given: float | None) -> float:
        """The scale of implicit rewards. Raises ConfigError where neither the user nor a run says it."""
        if given is not None:
            return given
        loss = (self.run or {}).get("loss", {})
        if "beta" not in loss:
            raise ConfigError("The run's loss has no beta to scale implicit rewards by.", where="beta", hint="beta=0.1")
        return float(loss["beta"])


def named_model(settings: ModelConfig) -> NamedModel:
    """The model that `model.path` names; of a run of dpo-train, its final model. Raises ModelError if it has none."""
    run = read_run(settings.path)
    if run is None:
        adapted = f" with the adapter {settings.adapter}" if settings.adapter else ""
        return NamedModel(settings, f"{settings.path}{adapted}", None)
    folder = Path(resolve_path(settings.path)).expanduser()
    final = folder / FINAL
    if not final.is_dir():
        raise ModelError(
            "This run has no final model yet.",
            where=str(folder),
            hint=f"dpo-train resume={folder} finishes it; dpo-export {folder} writes its newest checkpoint's model",
        )
    if settings.adapter is not None:
        raise ConfigError(
            "model.path names a run, whose final model has all its adapters.",
            where="model.adapter",
            hint="leave it out",
        )
    if (final / "config.json").is_file():
        return NamedModel(settings.model_copy(update={"path": str(final), "revision": None}), str(final), run)
    base = run["model"]
    if base["adapter"] is not None:
        raise ModelError(
            "This run's final model is an adapter on top of another adapter.",
            where=str(final),
            hint=f"dpo-export {folder} --merge --to FOLDER, then model.path=FOLDER",
        )
    merged = settings.model_copy(update={"path": base["path"], "revision": base["revision"], "adapter": str(final)})
    return NamedModel(merged, f"{base['path']} with the adapter {final}", run)


def read_run(path: str) -> dict[str, Any] | None:
    """The settings of the run whose folder this is; None for anything else."""
    file = run_settings_file(path)
    if file is None:
        return None
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        started_in = Path(yaml.safe_load(file.with_name(RUN_REQUEST).read_text(encoding="utf-8"))["cwd"])
        for key in ("path", "adapter", "reference"):
            # Relative paths of a run begin where it was started.
            name = settings["model"][key]
            if name is not None and not Path(name).exists() and (started_in / name).exists():
                settings["model"][key] = str(started_in / name)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ModelError(f"The run's settings cannot be read: {error}.", where=str(file)) from None
    found: dict[str, Any] = settings
    return found


def load_policy(model: NamedModel, backend: Backend) -> LoadedModel:
    """Without the adapters in training and the checkpointing that its settings may ask for: nothing is trained here."""
    return load_frozen_start(model.settings, device=backend.device, reading=backend.reading)


def reference_of(model: NamedModel, given: str | None) -> NamedModel:
    """The model that rewards are relative to. given: model.reference; None takes what the run was trained against."""
    settings = model.settings
    if given not in (None, "start", "base"):
        assert given is not None
        return named_reference(settings, given)
    if given == "base" and settings.adapter is not None:
        return NamedModel(settings.model_copy(update={"adapter": None}), settings.path, None)
    if model.run is None or given is not None:
        raise ConfigError(
            f"model.reference={given or 'null'} names no model that the policy could be compared with.",
            where="model.reference",
            hint="model.reference=FOLDER, the model that training began with",
        )
    began = model.run["model"]
    if began["reference"] not in (None, "start", "base"):
        return named_reference(settings.model_copy(update={"path": began["path"]}), began["reference"])
    adapter = began["adapter"] if began["reference"] != "base" else None
    start = settings.model_copy(update={"path": began["path"], "revision": began["revision"], "adapter": adapter})
    return NamedModel(start, began["path"] + (f" with the adapter {adapter}" if adapter else ""), None)


def named_reference(settings: ModelConfig, name: str) -> NamedModel:
    """A model by its folder or hub name; a folder that holds an adapter means the policy's base with that adapter."""
    folder = Path(resolve_path(name)).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        adapted = settings.model_copy(update={"adapter": name})
        return NamedModel(adapted, f"{settings.path} with the adapter {name}", None)
    return named_model(settings.model_copy(update={"path": name, "revision": None, "adapter": None}))


def load_frozen_reference(reference: NamedModel, policy: LoadedModel, backend: Backend) -> LoadedModel:
    """Raises ModelError where its vocabulary is another than the policy's. Without a tokenizer it has the policy's."""
    settings = reference.settings
    if settings.adapter is None and settings.revision is None:
        named = settings.model_copy(update={"reference": settings.path})
        loaded = load_reference(named, policy, device=backend.device, reading=backend.reading)
        assert loaded is not None
        return loaded
    loaded = load_policy(reference, backend)
    check_same_vocabulary(policy.tokenizer, loaded.tokenizer, where=str(loaded.folder))
    return loaded
