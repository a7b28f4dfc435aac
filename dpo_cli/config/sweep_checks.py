"""Sweeps that cannot be run as asked for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from dpo_cli.config.machine_checks import Check, Values
from dpo_cli.config.schema import SweepConfig
from dpo_cli.errors import ConfigError


def sweep_settings(values: Mapping[str, Any]) -> SweepConfig | None:
    """The section `sweep` of composed values; None where something in it is wrong, which `check` tells."""
    try:
        return SweepConfig.model_validate(values.get("sweep"))
    except ValidationError:
        return None


def a_search_ends(values: Values) -> ConfigError | None:
    sampler, trials = values["sweep.sampler"], values["sweep.trials"]
    if sampler == "grid" and trials is not None:
        return ConfigError(
            "sweep.trials is for searches; a grid trains with every combination.",
            where="sweep.trials",
            hint="sweep.sampler=tpe, or leave it out",
        )
    if sampler != "grid" and trials is None:
        return ConfigError(f"sweep.sampler={sampler} never ends.", where="sweep.trials", hint="sweep.trials=20")
    return None


def a_search_has_its_library(values: Values) -> ConfigError | None:
    if values["sweep.sampler"] == "grid" or find_spec("optuna") is not None:
        return None
    return ConfigError(
        f"sweep.sampler={values['sweep.sampler']} needs the package optuna, which is not installed.",
        where="sweep.sampler",
        hint='pip install "dpo-cli[optuna]", or sweep.sampler=grid',
    )


def a_cluster_has_its_library(values: Values) -> ConfigError | None:
    cluster = values["sweep.cluster"]
    if cluster is not None and find_spec("submitit") is None:
        return ConfigError(
            f"sweep.cluster={cluster} needs the package submitit, which is not installed.",
            where="sweep.cluster",
            hint='pip install "dpo-cli[slurm]", or sweep.cluster=null',
        )
    if cluster == "slurm" and shutil.which("srun") is None:
        return ConfigError(
            "This machine has no SLURM: there is no srun.",
            where="sweep.cluster",
            hint="sweep.cluster=local runs jobs in processes of this machine",
        )
    return None


def cluster_settings_have_a_cluster(values: Values) -> ConfigError | None:
    if values["sweep.cluster"] is not None:
        return None
    for key in ("sweep.parallel", "sweep.partition", "sweep.gpus"):
        if values[key] is not None:
            hint = "sweep.cluster=slurm, or leave it out"
            return ConfigError(f"{key} is for jobs on a cluster.", where=key, hint=hint)
    return None


SWEEP_CHECKS: tuple[Check, ...] = (
    (a_search_ends, ("sweep.sampler", "sweep.trials")),
    (a_search_has_its_library, ("sweep.sampler",)),
    (a_cluster_has_its_library, ("sweep.cluster",)),
    (cluster_settings_have_a_cluster, ("sweep.cluster", "sweep.parallel", "sweep.partition", "sweep.gpus")),
)
