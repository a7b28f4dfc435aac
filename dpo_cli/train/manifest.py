"""A checkpoint's manifest: what every file was when it was written, so that any changed byte is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpo_cli.atomic import content_hash

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
_FORMAT = 2


def describe(folder: Path, names: list[str]) -> dict[str, Any]:
    """The manifest's entries of some files, from what lies on the disk."""
    files: dict[str, Any] = {}
    for name in names:
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "hash": content_hash(path)}
        if name.endswith(TENSORS):
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                files[name]["tensors"] = {key: [part.get_dtype(), part.get_shape()] for key, part in slices.items()}
    return files


def manifest(step: int, files: dict[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "step": step, "files": files}


def problem_with(folder: Path, step: int, *, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a published checkpoint, or None: its manifest is made again and must come out the same.

    Of several ranks each looks at every `ranks`-th file.
    """
    try:
        read = json.loads((folder / MANIFEST).read_bytes())
        written_format, written_step, files = read["format"], read["step"], dict(read["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if written_format != _FORMAT:
        return f"{MANIFEST} is of format {written_format}, this version reads {_FORMAT}"
    if written_step != step or STATE not in files:
        return f"{MANIFEST} belongs to another checkpoint"
    for name, written in list(files.items())[rank::ranks]:
        try:
            if describe(folder, [name])[name] != written:
                return f"{name} is not what {MANIFEST} says"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, SafetensorError, ValueError) as error:
            return f"{name} cannot be read: {error}"
    return None
