"""The folder of a run: made whole or not at all, never over another one, and read back to resume."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_cli.config.compose.composition import Request
from dpo_cli.config.schema import Config
from dpo_cli.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.yaml"
REQUEST_FILE = "overrides.yaml"
SWEEP_FILE = "sweep.yaml"
# Written once data and model are known to be usable.
_BEGUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_RANKS_LOCK_FILE = "ranks/.lock"
_RANKS_END_SECONDS = 20.0
_DEFAULT_CONFIG = "config"


@dataclass(frozen=True)
class SavedRun:
    """request: what its user typed, later resumes included. settings: the resolved configuration. cwd: where from."""

    folder: Path
    request: Request
    settings: dict[str, Any]
    cwd: str


def check_free(folder: Path) -> None:
    """Raises ConfigError when a run of this name would write over something."""
    if not folder.exists():
        for parent in folder.absolute().parents:
            if parent.exists() and not parent.is_dir():
                raise ConfigError(f"{parent} is a file, so {folder} cannot be made in it.", where="run_dir")
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder.", where="run_dir", hint="run_dir=ANOTHER")
    if any(folder.iterdir()):
        if (folder / REQUEST_FILE).exists():
            raise ConfigError(f"{folder} holds a run already.", where="run_dir", hint=f"dpo-train resume={folder}")
        if (folder / SWEEP_FILE).exists():
            raise ConfigError(f"{folder} holds a sweep already.", where="run_dir", hint=f"dpo-train resume={folder}")
        raise ConfigError(f"{folder} is not empty.", where="run_dir", hint="run_dir=ANOTHER, or leave run_dir out")


def unused_name(folder: str) -> str:
    """The folder's name, or the first numbered one that is free: several runs may start in one second."""
    numbered = (folder if count == 1 else f"{folder}_{count}" for count in itertools.count(1))
    return next(name for name in numbered if not Path(name).exists())


def create_run_folder(config: Config, request: Request) -> Path:
    """Make config.run_dir with the configuration and the request inside. Raises ConfigError when it is not free."""
    folder = Path(config.run_dir)
    _create(
        folder,
        {CONFIG_FILE: config.as_dict(), REQUEST_FILE: _request_as_dict(request)},
    )
    return folder


def discard_unbegun(folder: Path) -> None:
    """Take away a run's folder in which nothing was computed yet, so that a mended command may use its name."""
    if not (folder / _BEGUN_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)


def create_sweep_folder(folder: Path, request: Request) -> None:
    _create(folder, {SWEEP_FILE: _request_as_dict(request)})


def save_resumed_sweep(folder: Path, request: Request) -> None:
    """Replace a sweep's saved request by that it goes on with."""
    _replace_yaml(folder / SWEEP_FILE, _request_as_dict(request))


def read_saved_sweep(folder: Path) -> Request:
    """What the user of a sweep typed. Raises CheckpointError when it is damaged."""
    return _request_in(folder / SWEEP_FILE, _read_yaml(folder / SWEEP_FILE))


def save_resumed(folder: Path, config: Config, request: Request) -> None:
    """Replace a run's saved configuration and request by those it goes on with."""
    for name, content in ((CONFIG_FILE, config.as_dict()), (REQUEST_FILE, _request_as_dict(request))):
        _replace_yaml(folder / name, content)


def read_saved_run(folder: Path) -> SavedRun:
    """Raises CheckpointError when `folder` is no run folder, or its settings are damaged."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no run folder {folder}.", where="resume", hint=_newest_run(folder.parent))
    if not (folder / REQUEST_FILE).exists():
        run = next((parent for parent in folder.absolute().parents if (parent / REQUEST_FILE).exists()), None)
        hint = f"resume={run}" if run else _newest_run(folder)
        hint = hint or "name the folder that holds config.yaml and checkpoints/"
        raise CheckpointError(f"{folder} is not a run folder: it has no {REQUEST_FILE}.", where="resume", hint=hint)
    saved, settings = _read_yaml(folder / REQUEST_FILE), _read_yaml(folder / CONFIG_FILE)
    request = _request_in(folder / REQUEST_FILE, saved)
    return SavedRun(folder, request, settings, str(saved["cwd"]))


def is_sweep(folder: Path) -> bool:
    return (folder / SWEEP_FILE).exists()


def _request_in(file: Path, saved: dict[str, Any]) -> Request:
    try:
        config_dir, _ = saved["config_dir"], saved["cwd"]
        return Request(
            overrides=tuple(map(str, saved["overrides"])),
            config_dir=Path(config_dir) if config_dir is not None else None,
            config_name=str(saved["config_name"]),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file.name} is damaged: {error!r}.", where=str(file)) from None


@contextmanager
def exclusive(folder: Path, *, doing: str = "training in this run folder") -> Iterator[None]:
    """Hold the folder for this process. Raises CheckpointError when another one is `doing` the same."""
    with (folder / _LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"Another process is {doing}.", where=str(folder), hint="wait for it, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        # Ranks may outlive the dpo-train that started them by the seconds that saving takes.
        if (folder / _RANKS_LOCK_FILE).exists():
            with _locked(folder / _RANKS_LOCK_FILE, fcntl.LOCK_EX, wait_seconds=_RANKS_END_SECONDS):
                pass
        yield


@contextmanager
def sharing(folder: Path) -> Iterator[None]:
    """Hold the run folder as one of several ranks that train in it."""
    with _locked(folder / _RANKS_LOCK_FILE, fcntl.LOCK_SH, wait_seconds=_RANKS_END_SECONDS):
        yield


@contextmanager
def _locked(file: Path, kind: int, *, wait_seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + wait_seconds
    with file.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        "Processes of an earlier start are still at work in this run folder.",
                        where=str(file.parent),
                        hint="wait for them to end: they are saving",
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield


def _create(folder: Path, files: dict[str, Any]) -> None:
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A rename is all or nothing: a kill leaves no half-made run, and of two runs at the same moment one wins.
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    try:
        for name, content in files.items():
            _write_yaml(temporary / name, content)
        temporary.rename(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            check_free(folder)
        raise


def _request_as_dict(request: Request) -> dict[str, Any]:
    return {
        "config_dir": str(request.config_dir.resolve()) if request.config_dir is not None else None,
        "config_name": request.config_name,
        "overrides": list(request.overrides),
        "cwd": str(Path.cwd()),
    }


def _replace_yaml(file: Path, content: Any) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    _write_yaml(temporary, content)
    temporary.replace(file)


def _write_yaml(file: Path, content: Any) -> None:
    with file.open("w", encoding="utf-8") as opened:
        yaml.safe_dump(content, opened, sort_keys=False, allow_unicode=True, width=120)
        opened.flush()
        os.fsync(opened.fileno())


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {str(error).splitlines()[0]}.", where=str(file)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.name} is damaged: it holds no keys and values.", where=str(file))
    return content


def _newest_run(parent: Path) -> str | None:
    runs = [item for item in parent.iterdir() if (item / REQUEST_FILE).exists()] if parent.is_dir() else []
    newest = max(runs, key=lambda run: run.stat().st_mtime, default=None)
    return f"the newest run there: resume={newest}" if newest else None
