"""What parameters a loss function takes, read from its source.

Importing the function would import torch, and a misspelt parameter is to be found before that.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from dpo_cli.config.suggest import closest
from dpo_cli.errors import ConfigError

_MAX_REEXPORTS = 8


@dataclass(frozen=True)
class Parameter:
    """annotation: as the source states it, or None. required: it has no default."""

    name: str
    annotation: str | None
    required: bool


@dataclass(frozen=True)
class LossSignature:
    """parameters: all but the first, which receives the log-probs. open: it takes any further keyword (**kwargs)."""

    parameters: tuple[Parameter, ...]
    open: bool

    @property
    def names(self) -> list[str]:
        return [parameter.name for parameter in self.parameters]


def read_signature(target: str) -> LossSignature | None:
    """The signature of the function at a dotted path; None where its source does not tell (compiled, or computed).

    Raises ConfigError when there is no such module or function.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError(
            f"{target} is not a dotted path to a function.", hint="write module.function, as in my_losses.my_loss"
        )
    return _find(module, name, _MAX_REEXPORTS)


def _find(module: str, name: str, hops: int) -> LossSignature | None:
    file = find_module_file(module)
    if file is None or file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid Python: {error}.", where=str(file)) from None
    functions: list[str] = []
    opaque = False
    # The last definition wins, as it does when the module is imported.
    for node in reversed(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            functions.append(node.name)
            if node.name == name:
                return _signature(node.args)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and hops:
                    return _find(_absolute(node, module, file), alias.name, hops - 1)
                opaque |= alias.name == "*"
        elif not isinstance(node, ast.Import | ast.Expr):
            # An assignment, class or branch may define the name in a way that the source alone does not tell.
            opaque |= name in {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} or (
                isinstance(node, ast.ClassDef) and node.name == name
            )
    if opaque:
        return None
    found = closest(name, functions)
    raise ConfigError(
        f"{module} has no function {name}.",
        where=str(file),
        hint=f"did you mean {module}.{found}?" if found else None,
    )


def find_module_file(module: str) -> Path | None:
    """The file a module would be loaded from, found without importing it or its packages.

    None for a module without a source of its own. Raises ConfigError when there is none on sys.path.
    """
    search: list[str] | None = None
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for count, part in enumerate(parts, start=1):
        if not part.isidentifier():
            raise ConfigError(f"{module} is not the name of a Python module.")
        spec = PathFinder.find_spec(part if search is None else ".".join(parts[:count]), search)
        if spec is None:
            raise ConfigError(
                f"There is no Python module {'.'.join(parts[:count])}.",
                hint="start dpo-train in the folder that holds it, install it, or put its folder on PYTHONPATH",
            )
        search = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None


def import_path_includes(folder: Path) -> None:
    """Let modules in `folder` be found: a console script, unlike `python -m`, does not look where it is started."""
    if str(folder) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(folder))


def _absolute(node: ast.ImportFrom, module: str, file: Path) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, *filter(None, [node.module])])


def _signature(arguments: ast.arguments) -> LossSignature:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*arguments.defaults]
    padded = [None] * (len(positional) - len(defaults)) + defaults
    pairs = list(zip(positional, padded, strict=True))[1:] + list(
        zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    )
    return LossSignature(
        parameters=tuple(
            Parameter(argument.arg, ast.unparse(argument.annotation) if argument.annotation else None, default is None)
            for argument, default in pairs
        ),
        open=arguments.kwarg is not None,
    )
