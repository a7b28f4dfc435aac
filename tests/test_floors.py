"""Imports point down only, and a few libraries are known to a few rooms only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dpo_cli"

# The floor of every room; a file named here stands on a floor other than its room's.
FLOORS = {
    "": 0,
    "errors": 0,
    "paths": 0,
    "atomic": 0,
    "durations": 0,
    "losses": 0,
    "batch": 0,
    "train.schedule": 0,
    "data.example": 0,
    "example": 0,
    "health": 0,
    "config": 1,
    "data": 1,
    "policy": 2,
    "engine": 2,
    "forecast": 3,
    "reference": 3,
    "rollout": 3,
    "train.checkpoint": 3,
    "train.manifest": 3,
    "train.metrics": 3,
    "train.metric_sums": 3,
    "train": 4,
    "tracking": 4,
    "report": 5,
    "evaluation": 5,
    "inspection": 5,
    "cli": 6,
    "__main__": 6,
}
# The ground floor must be usable, and testable, with next to nothing installed.
GROUND_FLOOR_LIBRARIES = {"torch", "numpy"}
# Who alone may import what.
OWNERS = {
    "deepspeed": ("engine",),
    "torch.distributed": ("engine",),
    "hydra": ("cli", "config.compose"),
    "omegaconf": ("cli", "config.compose"),
    "pydantic": ("config",),
    "matplotlib": ("report",),
    "wandb": ("tracking",),
    "mlflow": ("tracking",),
    "trackio": ("tracking",),
    "optuna": ("cli.sweep",),
    "submitit": ("cli.sweep",),
    "trl": (),
    "pickle": (),
}


def modules() -> list[str]:
    return sorted(
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        for file in PACKAGE.rglob("*.py")
    )


def source_of(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str) -> Iterator[str]:
    """Full names of what a module imports, at its top or inside a function; names from a module included."""
    for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(module: str) -> int | None:
    """The floor of a module, or of the room around it; None where there is no such room."""
    parts = module.split(".")
    rooms = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((FLOORS[room] for room in rooms if room in FLOORS), None)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


@pytest.mark.parametrize("module", modules())
def test_imports_point_down_only(module: str) -> None:
    floor = floor_of(module)
    assert floor is not None, f"{module} stands on no floor: add its room to the table"
    for name in imports_of(module):
        if within(name, "dpo_cli"):
            imported = name.removeprefix("dpo_cli").lstrip(".")
            above = floor_of(imported) if imported else 0
            assert above is not None, f"{module} imports {name}, which stands on no floor"
            assert above <= floor, f"{module} (floor {floor}) imports {name} (floor {above})"


@pytest.mark.parametrize("module", [module for module in modules() if floor_of(module) == 0 and module])
def test_the_ground_floor_needs_torch_and_numpy_only(module: str) -> None:
    import sys

    libraries = {name.partition(".")[0] for name in imports_of(module)} - set(sys.stdlib_module_names)
    assert libraries <= GROUND_FLOOR_LIBRARIES | {"dpo_cli"}


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_known_to_its_owners_only(library: str) -> None:
    users = {module for module in modules() if any(within(name, library) for name in imports_of(module))}
    assert not [user for user in users if not any(within(user, owner) for owner in OWNERS[library])]


def test_the_table_of_floors_has_no_forgotten_rooms() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders <= set(FLOORS)
