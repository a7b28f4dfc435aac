"""A model out of a run's checkpoint, at any time: while it trains, or after it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpo_cli.config.schema import Config
from dpo_cli.engine.interface import WEIGHTS, check_names, checked_shape
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.export import SHARD_SIZE, export_final, final_state, in_dtype
from dpo_cli.policy.load import DTYPES, LoadedModel, load_frozen_start, load_model, quiet_loading
from dpo_cli.train.checkpoint import CheckpointStore
from dpo_cli.train.device import choose_device
from dpo_cli.train.final import card_of
from dpo_cli.train.objective import Objective
from dpo_cli.train.parts import build_loss

# Whose log-probs are compared before and after. Nothing rests on its words: to a tokenizer that knows none of them,
# they are unknown tokens like any others.
_PROBE = "The policy is trained on pairs: 2 + 2 = 4 is chosen, and 2 + 2 = 5 is rejected."
_PROBE_TOKENS = 32
# Mean difference a token, in nats, that rounding explains: float32 merges and kernels stay below 1e-4, and 16 bits have
# two or three digits of a logit.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


def checkpoint_model(
    config: Config, *, run_dir: Path, step: int | None, device: torch.device, say: Callable[[str], None]
) -> tuple[LoadedModel, int]:
    """The policy of a run as a checkpoint holds it, and the checkpoint's step. step: None takes the newest.

    Raises CheckpointError where there is no such checkpoint.
    """
    checkpoints = CheckpointStore(run_dir / "checkpoints", keep=1, notify=say)
    checkpoint = checkpoints.latest_good(step=step)
    if checkpoint is None:
        raise CheckpointError(
            "There is no checkpoint." if step is None else f"There is no whole checkpoint of step {step}.",
            where=str(run_dir / "checkpoints"),
            hint="leave --step out to take the newest" if step is not None else None,
        )
    # Nothing is trained here: a kernel that only the GPU of the run has is not missed, and nothing is checkpointed.
    settings = config.model.model_copy(update={"attention": "auto", "gradient_checkpointing": False})
    policy = load_model(settings, device=device, seed=config.seed)
    saved = checkpoints.load(checkpoint)[WEIGHTS]
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    check_names(saved, trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(checked_shape(name, saved[name], parameter.shape))
    return policy, checkpoint.step


def export_run(
    config: Config,
    *,
    run_dir: Path,
    folder: Path | None,
    step: int | None,
    merge: bool | None,
    dtype: str | None = None,
    max_shard_size: str = SHARD_SIZE,
    say: Callable[[str], None],
) -> Path:
    """Write the model of a checkpoint as a Hugging Face folder, on the CPU; returns the folder.

    folder: where to; None: beside the checkpoints, named after the step. step: None takes the newest checkpoint.
    merge: LoRA into the weights; None does as the run was told to. dtype: of the weights; None leaves them as they are.
    max_shard_size: of one weight file, such as 5GB.
    What was written is opened again, and must give a short text the log-probs that the policy gives it.
    Raises CheckpointError where there is no such checkpoint, the folder exists, or reads back as another model.
    """
    policy, found = checkpoint_model(config, run_dir=run_dir, step=step, device=choose_device("cpu"), say=say)
    target = folder or run_dir / f"export-step-{found:08d}"
    lora = config.model.lora
    state = final_state(policy, merge=lora is None or (lora.merge if merge is None else merge))
    written = policy
    if dtype is not None:
        written, state = replace(policy, dtype=DTYPES[dtype]), in_dtype(state, DTYPES[dtype])
    card = card_of(config, Objective.of(build_loss(config)), run_dir=run_dir, difference=None, step=found)
    export_final(written, target, card=card, state=state, max_shard_size=max_shard_size)
    if state.weights is None and config.model.adapter is not None:
        say("this adapter lies on top of another one, so it is not opened again: nothing opens the two by themselves")
        return target
    try:
        _compare(policy, written, target, config, alone=state.weights is None, say=say)
    except BaseException:
        shutil.rmtree(target)
        raise
    return target


def _compare(
    policy: LoadedModel, written: LoadedModel, folder: Path, config: Config, *, alone: bool, say: Callable[[str], None]
) -> None:
    """alone: `folder` holds an adapter without its base."""
    ids = policy.tokenizer(_PROBE, add_special_tokens=False)["input_ids"][:_PROBE_TOKENS]
    if len(ids) < 2:  # a tokenizer that takes all of it for one unknown word
        ids = [0, 1]
    before = _logps(policy.model, ids)
    if alone:
        settings = config.model.model_copy(update={"attention": "auto", "adapter": str(folder)})
        reopened = load_frozen_start(settings, device=torch.device("cpu")).model
    else:
        with quiet_loading():
            reopened = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=written.dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=type(policy.model).is_remote_code(),
            )
    difference = float((_logps(reopened, ids) - before).abs().mean())
    rounding = max(_ROUNDING[policy.dtype], _ROUNDING[written.dtype])
    if not difference <= rounding:
        raise CheckpointError(
            f"The exported model gives other log-probs than the policy: by {difference:.2g} nats a token, where "
            f"rounding explains {rounding:g}. It was removed.",
            where=str(folder),
            hint="--dtype float32 tells whether it is rounding; else the model's class does not read back as written",
        )
    say(f"opened again: log-probs of {len(ids) - 1} tokens are the policy's to {difference:.1e} nats a token")


@torch.no_grad()
def _logps(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """(tokens - 1,) of each token after the first."""
    model.eval()
    row = torch.tensor([list(ids)])
    logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
