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
_FORMAT = 1


def describe(folder: Path, step: int, names: list[str]) -> dict[str, Any]:
    """The manifest, from what lies on the disk."""
    files: dict[str, Any] = {}
    for name in names:
        path = folder / name
        files[name] = {"bytes": path.stat().st_size, "hash": content_hash(path)}
        if name.endswith(TENSORS):
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
                files[name]["tensors"] = {key: [part.get_dtype(), part.get_shape()] for key, part in slices.items()}
    return {"format": _FORMAT, "step": step, "files": files}


def problem_with(folder: Path, step: int) -> str | None:
    """What is wrong with a published checkpoint, or None: its manifest is made again and must come out the same."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        written_format, written_step, files = manifest["format"], manifest["step"], dict(manifest["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if written_format != _FORMAT:
        return f"{MANIFEST} is of format {written_format}, this version reads {_FORMAT}"
    if written_step != step or STATE not in files:
        return f"{MANIFEST} belongs to another checkpoint"
    for name, written in files.items():
        try:
            if describe(folder, step, [name])["files"][name] != written:
                return f"{name} is not what {MANIFEST} says"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, SafetensorError, ValueError) as error:
            return f"{name} cannot be read: {error}"
    return None
