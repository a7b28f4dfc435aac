"""Write the file tree of README.md from the files' own first lines. `--check` only tells whether it is up to date."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree: scripts/readme_tree.py -->\n```\n", "```\n<!-- end of tree -->"
# Folders whose files are told in one line together.
SUMMARIES = {
    "dpo_cli/conf": "Defaults, one YAML file a choice; every key with its meaning, unit and range",
    "dpo_cli/recipes": "Whole experiments: command, hardware, hours, expected result",
    "dpo_cli/example": "The embedded example: base policy, preference pairs, test problems",
    "dpo_cli/report/pages": "Templates of a page, which escape whatever is put into them, and its style sheet",
    "tests": "Mirror dpo_cli/; tests/end_to_end trains, kills and resumes from the shell",
    "docs": "From the first run to the design; docs/README.md is the index",
}
WIDTH = 24


def tree() -> str:
    lines = [line for folder in ("dpo_cli", "scripts") for line in _folder(ROOT / folder, depth=0)]
    lines += [_line(f"{name}/", told, 0) for name, told in SUMMARIES.items() if "/" not in name]
    return "\n".join(lines) + "\n"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    name = folder.relative_to(ROOT).as_posix()
    if name in SUMMARIES:
        yield _line(f"{folder.name}/", SUMMARIES[name], depth)
        return
    told = folder / "__init__.py"
    yield _line(f"{folder.name}/", _first_line(told) if told.exists() else "What developers run", depth)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and path.name != "__pycache__":
            yield from _folder(path, depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield _line(path.name, _first_line(path), depth + 1)


def _line(name: str, told: str, depth: int) -> str:
    return f"{'  ' * depth}{name}".ljust(WIDTH) + f"  {told.rstrip('.')}"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    before, rest = old.split(BEGIN)
    new = before + BEGIN + tree() + END + rest.split(END, 1)[1]
    if "--check" in sys.argv:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
