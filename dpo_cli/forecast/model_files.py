"""Read a model's shape from its folder: config.json, and the headers of its weight files where they are."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_cli.errors import ModelError
from dpo_cli.forecast.shape import ModelShape
from dpo_cli.policy.folder import check_safetensors_file, resolve_config_folder, weight_files

# Written by some tools, read by no model of today: tables that are computed.
_NOT_PARAMETERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
_OUTPUT_HEAD = "lm_head.weight"


def read_shape(path: str, revision: str | None) -> tuple[ModelShape, str]:
    """The shape of a model, and what its parameters were counted from. No weights are read or fetched.

    Raises ModelError when there is no such model, or its config does not tell.
    """
    folder = resolve_config_folder(path, revision)
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("This model folder has no config.json.", where=str(folder)) from None
    except ValueError as error:
        raise ModelError(f"The model's config cannot be read: {error}", where=str(file)) from error
    if not isinstance(config, Mapping):
        raise ModelError("The model's config is not a section of keys.", where=str(file))
    shape = ModelShape.of(config)
    counted = _counted(folder, tied=shape.tied)
    if counted is None:
        return shape, "config.json"
    return ModelShape.of(config, counted_parameters=counted), "the headers of its weight files"


def _counted(folder: Path, *, tied: bool) -> int | None:
    """Numbers in the weight files of a folder; None where they are not, or not yet, or not whole."""
    try:
        files = weight_files(folder)
        for file in files:
            check_safetensors_file(file)
    except ModelError:
        return None
    entries = {name: entry for file in files for name, entry in _header(file).items() if name != "__metadata__"}
    return sum(
        math.prod(entry["shape"])
        for name, entry in entries.items()
        if not name.endswith(_NOT_PARAMETERS) and not (tied and name == _OUTPUT_HEAD)
    )


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return dict(json.loads(opened.read(length)))
