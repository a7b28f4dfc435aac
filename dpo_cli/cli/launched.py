"""Whether the processes there are fit the hardware that was configured; asked before a run folder is made."""

from __future__ import annotations

from dpo_cli.config.schema import HardwareConfig
from dpo_cli.engine.environment import is_worker, world_size
from dpo_cli.errors import ConfigError


def check_launch(hardware: HardwareConfig) -> None:
    """Raises ConfigError when a launcher has started another number of ranks than the configuration has in mind."""
    if not is_worker():
        return
    if hardware.zero_stage is None and world_size() > 1:
        raise ConfigError(
            f"hardware={hardware.name} trains in one process, and the launcher has started {world_size()}.",
            where="hardware",
            hint="hardware=deepspeed_zero3",
        )
    if hardware.num_workers not in (None, world_size()):
        raise ConfigError(
            f"hardware.num_workers is {hardware.num_workers}, and the launcher has started {world_size()} processes.",
            where="hardware.num_workers",
            hint="leave it out: the launcher decides",
        )
