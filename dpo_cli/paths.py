"""Names of files that travel inside the package, so that a saved config means the same on every machine."""

from __future__ import annotations

from pathlib import Path

PACKAGE_SCHEME = "dpo_cli://"
_PACKAGE_FOLDER = Path(__file__).resolve().parent


def resolve_path(name: str) -> str:
    """Turn "dpo_cli://example/pairs.jsonl" into the installed file's path; any other name is returned unchanged."""
    if not name.startswith(PACKAGE_SCHEME):
        return name
    return str(_PACKAGE_FOLDER / name.removeprefix(PACKAGE_SCHEME))
