"""Put on PYTHONPATH by a test: this process dies, as by kill -9, in a chosen phase of saving a checkpoint.

FAULT=RANK:PHASE:COUNT, where PHASE is the name of a function of the checkpoint module and COUNT how many calls survive.
Patched when the module is first imported, so that everything else is exactly what users run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from typing import Any

_MODULE = "dpo_cli.train.checkpoint"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_patch(module: Any) -> None:
            execute(module)
            _patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(module: Any) -> None:
    rank, phase, survived = os.environ["FAULT"].split(":")
    if rank != os.environ["RANK"]:
        return
    holder = module.CheckpointStore if hasattr(module.CheckpointStore, phase) else module
    original, calls = getattr(holder, phase), [0]

    def fatal(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > int(survived):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(holder, phase, fatal)


if "FAULT" in os.environ and "RANK" in os.environ:
    sys.meta_path.insert(0, _Finder())
