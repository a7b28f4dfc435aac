"""The configuration files that come with the package: what there is to choose from, and what each key means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
CONF_FOLDER = _PACKAGE / "conf"
RECIPES_FOLDER = _PACKAGE / "recipes"
GROUPS = ("model", "data", "loss", "optimizer", "hardware", "logger", "recipe")
# Those of dpo-sample and dpo-eval.
COMMAND_GROUPS = ("model", "hardware")


@dataclass(frozen=True)
class DocumentedKey:
    """A key as its YAML file states it. meaning: the comment above it, as one line."""

    name: str
    default: str
    meaning: str


def shipped_files() -> dict[str, Path]:
    """Every shipped file by its name in a config folder, such as loss/dpo.yaml."""
    files = {file.relative_to(CONF_FOLDER).as_posix(): file for file in sorted(CONF_FOLDER.rglob("*.yaml"))}
    return files | {f"recipe/{file.name}": file for file in sorted(RECIPES_FOLDER.glob("*.yaml"))}


def choices(group: str, *own: Path) -> list[str]:
    """The choices of a group, shipped and of a user's own config folders.

    Files that start with an underscore are only parts of others.
    """
    names = {Path(name).stem for name in shipped_files() if name.rpartition("/")[0] == group}
    names.update(file.stem for folder in own for file in (folder / group).glob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def file_of(group: str, choice: str) -> Path:
    folder = RECIPES_FOLDER if group == "recipe" else CONF_FOLDER / group
    return folder / f"{choice}.yaml"


def description(file: Path) -> str:
    """What a file is, in the first sentence of the comment it begins with; nothing if it begins otherwise."""
    comment: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].rstrip(".:")


def default_choices(file: Path) -> dict[str, str]:
    """What a file's defaults list chooses, by group; read as lines, because a YAML reader would take longer."""
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        group, colon, choice = line.strip().removeprefix("- ").partition(": ")
        if line.startswith("  - ") and colon and group in GROUPS:
            found[group] = choice.strip("[]")
        elif found and line and not line.startswith(" "):
            break
    return found


def display_path(file: Path) -> str:
    """A shipped file by its place in the package, any other as it is."""
    for folder in (CONF_FOLDER, RECIPES_FOLDER):
        if file.is_relative_to(folder):
            return f"{folder.name}/{file.relative_to(folder).as_posix()} (shipped)"
    return str(file)


def is_shipped(place: str) -> bool:
    return place.endswith(" (shipped)")


def documented_keys(file: Path, section: str = "") -> list[DocumentedKey]:
    """Keys of a YAML file with their comments, nested ones by their dotted names; lists and interpolations verbatim.

    Reads lines instead of YAML, because YAML readers drop comments; the shipped files keep to one key a line.
    """
    keys: list[DocumentedKey] = []
    comment: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text:
            comment = []
        elif text.startswith("#"):
            comment.append(text.lstrip("# "))
        elif not text.startswith("- ") and ":" in text:
            name, _, value = text.partition(":")
            while parents and parents[-1][0] >= indent:
                parents.pop()
            dotted = ".".join([*filter(None, [section]), *(parent for _, parent in parents), name])
            if name not in ("defaults", "_target_", "_partial_"):
                keys.append(DocumentedKey(dotted, value.strip(), " ".join(comment)))
            parents.append((indent, name))
            comment = []
    return keys
