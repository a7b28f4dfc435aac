"""Importing torch and transformers, which is most of a start, without what only slows it down."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_DEEPSPEED = "deepspeed"
_SCANNING = "transformers.utils.import_utils"


@contextmanager
def heavy_imports(*, deepspeed: bool) -> Iterator[None]:
    """Import what computes inside this. Where torch is there already, as in a sweep's second job, nothing is special.

    The garbage collector rests: modules make some hundred thousand objects that stay, and it would look at all of them
    over and over, for a sixth of the time. What is there at the end it never looks at again, in training neither.
    transformers reads its models' files, 1,600 of them, once to see what they define; by itself it does so twice.
    deepspeed: whether it will be used. transformers and accelerate import it wherever it is installed, for half a
        second; a process that computes alone does as if it were not.
    """
    if "torch" in sys.modules:
        # What is frozen now would also be what an earlier job has left to be collected, its model among it.
        yield
        return
    hides = not deepspeed and _DEEPSPEED not in sys.modules
    collects = gc.isenabled()
    gc.disable()
    if hides:
        # The import system's own mark of a module that cannot be imported.
        sys.modules[_DEEPSPEED] = None  # type: ignore[assignment]
    finder = _ScanningOnce()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if hides:
            del sys.modules[_DEEPSPEED]
        gc.freeze()
        if collects:
            gc.enable()


class _ScanningOnce:
    """A finder of modules that has transformers remember what it has read of its own folders."""

    def __init__(self) -> None:
        self._found = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _SCANNING or self._found:
            return None
        self._found = True
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            # Not a public function; where it is missing, nothing is gained.
            scan = getattr(module, "create_import_structure_from_path", None)
            if scan is not None:
                setattr(module, scan.__name__, functools.cache(scan))

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec
