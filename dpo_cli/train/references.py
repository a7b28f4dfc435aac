"""What a run's reference says of all its data: the policy as it starts, or another model, gone when it has spoken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dpo_cli.batch.order import examples_shown
from dpo_cli.config.schema import Config
from dpo_cli.data.example import Examples
from dpo_cli.engine.backend import Backend
from dpo_cli.engine.ranks import Ranks
from dpo_cli.policy.load import LoadedModel, load_reference
from dpo_cli.reference.identity import identity_of
from dpo_cli.reference.store import ReferenceStore, open_store
from dpo_cli.train.console import RunConsole
from dpo_cli.train.loop import LoopSettings
from dpo_cli.train.micro_batch import PreferenceData
from dpo_cli.train.objective import Objective
from dpo_cli.train.on_policy import truths_shown
from dpo_cli.train.parts import reference_name
from dpo_cli.train.reference_pass import ReferencePass, release_memory
from dpo_cli.train.run_data import RunData
from dpo_cli.train.stop import StopRequest


@dataclass(frozen=True)
class References:
    """Train and held-out data and the generator's ground truths, each with what the reference says of it."""

    train: PreferenceData
    held_out: PreferenceData | None
    truths: PreferenceData | None


@dataclass(frozen=True)
class Scorer:
    """A run's data, and how far it will see them. truths: of the generator, where there is one."""

    config: Config
    run_dir: Path
    console: RunConsole
    stop: StopRequest
    ranks: Ranks
    data: RunData
    truths: Examples | None
    settings: LoopSettings

    def by_another_model(self, policy: LoadedModel, objective: Objective, backend: Backend) -> References | None:
        """Score with the reference where it is not the policy as it starts, and give its memory back; else None.

        A loss without a reference has its references at once: none.
        """
        data, config = self.data, self.config
        if not objective.declaration.needs_reference:
            held_out = None if data.eval is None else PreferenceData(data.eval, None)
            return References(PreferenceData(data.train, None), held_out, None)
        self.console.say(f"reference model: {reference_name(config)}")
        reference = load_reference(
            config.model, policy, device=backend.device, max_tokens=config.data.max_tokens, reading=backend.reading
        )
        if reference is None:
            return None
        store_dir = Path(config.store_dir).expanduser()
        store = open_store(store_dir, identity_of(reference, store_dir=store_dir, ranks=self.ranks))
        with backend.scoring(reference.packed(), reference.dtype) as packed:
            found = self.by(packed, reference.dtype_name, store)
        del packed, reference
        release_memory()
        return found

    def by(self, packed: nn.Module, dtype_name: str, store: ReferenceStore) -> References:
        """Score with `packed`, whose values `store` keeps, what the run will see and is not there yet."""
        data, truths, settings = self.data, self.truths, self.settings
        scoring = ReferencePass(
            packed=packed,
            dtype_name=dtype_name,
            store=store,
            run_dir=self.run_dir,
            tokens_per_batch=settings.tokens_per_microbatch,
            seed=settings.seed,
            console=self.console,
            stop=self.stop,
            ranks=self.ranks,
        )
        shown = examples_shown(
            min(settings.total_steps, self.config.model.reference_sync_steps or settings.total_steps),
            seed=settings.seed,
            examples=len(data.train),
            global_pairs=settings.global_pairs,
        )

        def scored(examples: Examples, split: str, indices: NDArray[np.int64]) -> PreferenceData:
            return PreferenceData(examples, scoring.sums(examples, split, indices))

        return References(
            train=scored(data.train, "train", shown),
            held_out=None if data.eval is None else scored(data.eval, "eval", np.arange(len(data.eval))),
            truths=None
            if truths is None
            else scored(truths, "generator", truths_shown(self.config, truths, settings.total_steps)),
        )
