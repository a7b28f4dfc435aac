"""Importing torch and transformers, which is most of a start, without what only slows it down."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DEEPSPEED = "deepspeed"


@contextmanager
def heavy_imports(*, deepspeed: bool) -> Iterator[None]:
    """Import what computes inside this. Where torch is there already, as in a sweep's second job, nothing is special.

    The garbage collector rests: modules make some hundred thousand objects that stay, and it would look at all of them
    over and over, for a sixth of the time. What is there at the end it never looks at again, in training neither.
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
    try:
        yield
    finally:
        if hides:
            del sys.modules[_DEEPSPEED]
        gc.freeze()
        if collects:
            gc.enable()
