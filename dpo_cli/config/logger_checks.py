"""Trackers that were chosen and cannot work here: the package is missing, or nobody is logged in."""

from __future__ import annotations

import netrc
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from dpo_cli.config.machine_checks import Check, Values
from dpo_cli.errors import ConfigError

_WANDB_SITE = "https://api.wandb.ai"
_WANDB_SETTINGS = Path("~/.config/wandb/settings")


def library_is_installed(library: str, values: Values) -> ConfigError | None:
    if find_spec(library) is not None:
        return None
    return ConfigError(
        f"The tracker {library} needs the package {library}, which is not installed.",
        where="logger",
        hint=f'pip install "dpo-cli[{library}]", or leave {library} out of logger=[...]',
    )


def table_is_a_file_of_its_own(values: Values) -> ConfigError | None:
    """It is written anew again and again, and nothing that was there is to be lost by it."""
    file = values["logger.csv.file"]
    if Path(file).name == file and file.endswith(".csv"):
        return None
    return ConfigError(
        f"{file} is not the name of a CSV file in the run folder.", where="logger.csv.file", hint="metrics.csv"
    )


def wandb_knows_the_user(values: Values) -> ConfigError | None:
    """W&B would ask for a key in the middle of the run."""
    if values["logger.wandb.mode"] != "online" or find_spec("wandb") is None or _has_wandb_login():
        return None
    return ConfigError(
        "Nobody is logged in to W&B on this machine.",
        where="logger.wandb.mode",
        hint="wandb login, or WANDB_API_KEY; logger.wandb.mode=offline sends nothing",
    )


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # Settings of its own may name another server: it is not known here which.
    if _WANDB_SETTINGS.expanduser().exists():
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB_SITE)).hostname or ""
    try:
        file = os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


LOGGER_CHECKS: tuple[Check, ...] = (
    (partial(library_is_installed, "wandb"), ("logger.wandb.project",)),
    (partial(library_is_installed, "mlflow"), ("logger.mlflow.experiment",)),
    (partial(library_is_installed, "trackio"), ("logger.trackio.project",)),
    (table_is_a_file_of_its_own, ("logger.csv.file",)),
    (wandb_knows_the_user, ("logger.wandb.mode",)),
)
