"""Everything random in a forward pass is switched off: reference and policy are compared token by token."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpo_cli.errors import ModelError

_NOISE_WORDS = ("dropout", "pdrop", "layerdrop", "jitter")


def _is_noise(name: str) -> bool:
    return any(word in name for word in _NOISE_WORDS)


def switch_off_noise(config: Any) -> dict[str, float]:
    """Set every dropout and router-jitter field of a model's config to zero; return what they were."""
    before = {
        name: value
        for name, value in vars(config).items()
        if _is_noise(name) and isinstance(value, float | int) and not isinstance(value, bool) and value != 0
    }
    for name in before:
        setattr(config, name, 0.0)
    return before


def verify_no_noise(model: nn.Module, *, where: str) -> None:
    """Raise ModelError for a module that would still be random in training, whatever the config said."""
    for name, module in model.named_modules():
        active = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        active = active or any(
            _is_noise(field) and isinstance(value, float) and value > 0 for field, value in vars(module).items()
        )
        if active:
            raise ModelError(
                f"Dropout or noise is still active in {name or type(model).__name__}; log-probs would be random.",
                where=where,
                hint="set the model's dropout to 0 in its config.json",
            )
