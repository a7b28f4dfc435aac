"""The reference log-probs a run trains against: read, scored or resumed, and proved before the first step."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpo_cli.data.example import Example, Examples
from dpo_cli.engine.ranks import Ranks
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.packed_model import score_examples
from dpo_cli.reference.score import reference_sums
from dpo_cli.reference.spot_check import spot_check, tolerance_per_token
from dpo_cli.reference.store import ReferenceStore
from dpo_cli.reference.sums import ReferenceSums, data_digest
from dpo_cli.train.console import RunConsole
from dpo_cli.train.stop import StopRequest

SPOT_CHECKED_EXAMPLES = 8


@dataclass(frozen=True)
class ReferencePass:
    """How references are had: `packed`, with the weights of `dtype_name`, scores into `store`.

    All ranks take part, and all get the same sums.
    """

    packed: nn.Module
    dtype_name: str
    store: ReferenceStore
    run_dir: Path
    tokens_per_batch: int
    seed: int
    console: RunConsole
    stop: StopRequest
    ranks: Ranks

    def sums(self, examples: Examples, split: str, indices: NDArray[np.int64]) -> ReferenceSums:
        """Reference sums of the examples that the run will see, ascending `indices` of one split.

        They are kept in the run folder, so that a resumed run uses the same bits.
        Raises StoreError when rows scored again disagree, CheckpointError when the data changed since the run began,
        Interrupted when asked to stop while scoring.
        """
        file = self.run_dir / f"reference_{split}.safetensors"
        kept = self.ranks.broadcast(ReferenceSums.load(file) if self.ranks.is_main and file.exists() else None)
        if kept is not None and kept.data != data_digest(examples, kept.indices):
            raise CheckpointError(
                f"The {split} data are not those this run began with.",
                where=str(file),
                hint="put the data back as they were, or start a new run",
            )
        if kept is not None and kept.covers(indices):
            sums = kept
            self.console.say(f"reference: {len(sums.values):,} {split} responses kept by this run")
            self._remember(split, f"{len(sums.values):,} responses, kept by this run")
        else:
            with self.stop.deferred():
                sums = self._score(examples, split, indices if kept is None else np.union1d(indices, kept.indices))
            sums = sums if kept is None else sums.with_values_of(kept)
            if self.ranks.is_main:
                sums.save(file)
        checked = spot_check(
            examples,
            sums,
            self._score_together,
            k=SPOT_CHECKED_EXAMPLES,
            seed=self.seed,
            tolerance=tolerance_per_token(self.dtype_name),
            store=self.store if self.ranks.is_main else None,
        )
        self.console.say(checked.line)
        return sums

    def _score(self, examples: Examples, split: str, indices: NDArray[np.int64]) -> ReferenceSums:
        # Where everything is in the store, there is nothing to show.
        with self.console.progress_once_begun(f"scoring {split}") as progress:
            return reference_sums(
                examples,
                indices=indices,
                make_score=lambda: self._score_together,
                store=self.store,
                tokens_per_batch=self.tokens_per_batch,
                report=self.console.say,
                planned=lambda plan: self._remember(split, plan.hits),
                progress=progress,
                should_stop=lambda: self.stop.agreed(self.ranks),
                ranks=self.ranks,
            )

    def _remember(self, split: str, hits: str) -> None:
        if split == "train":
            self.console.remember("reference", hits)

    def _score_together(self, examples: Sequence[Example]) -> list[list[NDArray[np.float32]]]:
        return score_examples(self.packed, examples)


def release_memory() -> None:
    """Give a dropped model's memory back to the device before the policy's optimiser is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
