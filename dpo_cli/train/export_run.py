"""A model out of a run's checkpoint, at any time: while it trains, or after it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dpo_cli.config.schema import Config
from dpo_cli.engine.interface import WEIGHTS, check_names, checked_shape
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.export import export_final, final_state
from dpo_cli.policy.load import load_model
from dpo_cli.train.checkpoint import CheckpointStore
from dpo_cli.train.final import card_of
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss


def export_run(
    config: Config,
    *,
    run_dir: Path,
    folder: Path | None,
    step: int | None,
    merge: bool | None,
    say: Callable[[str], None],
) -> Path:
    """Write the model of a checkpoint as a Hugging Face folder, on the CPU; returns the folder.

    folder: where to; None: beside the checkpoints, named after the step. step: None takes the newest checkpoint.
    merge: LoRA into the weights; None does as the run was told to.
    Raises CheckpointError where there is no such checkpoint, or the folder exists.
    """
    checkpoints = CheckpointStore(run_dir / "checkpoints", keep=1, notify=say)
    checkpoint = checkpoints.latest_good(step=step)
    if checkpoint is None:
        raise CheckpointError(
            "There is no checkpoint." if step is None else f"There is no whole checkpoint of step {step}.",
            where=str(run_dir / "checkpoints"),
            hint="leave --step out to take the newest" if step is not None else None,
        )
    # Nothing is scored here: a kernel that only the GPU of the run has is not missed.
    settings = config.model.model_copy(update={"attention": "auto"})
    policy = load_model(settings, device=torch.device("cpu"), seed=config.seed)
    saved = checkpoints.load(checkpoint)[WEIGHTS]
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    check_names(saved, trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(checked_shape(name, saved[name], parameter.shape))
    lora = config.model.lora
    state = final_state(policy, merge=lora is None or (lora.merge if merge is None else merge))
    target = folder or run_dir / f"export-step-{checkpoint.step:08d}"
    card = card_of(config, Objective.of(build_loss(config)), run_dir=run_dir, difference=None)
    export_final(policy, target, card=card, state=state)
    return target
