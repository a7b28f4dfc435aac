"""TR-DPO: every so many steps the policy, as it stands, becomes the reference of the steps that follow.

Which examples those steps show is known beforehand, and the policy is at hand: it scores them at once, and no second
model is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpo_cli.batch.layout import pack, sum_by_response
from dpo_cli.batch.order import global_batch
from dpo_cli.batch.plan import shares
from dpo_cli.engine.ranks import Ranks
from dpo_cli.errors import CheckpointError, ConfigError
from dpo_cli.losses.types import Declaration
from dpo_cli.reference.sums import ReferenceSums, data_digest
from dpo_cli.train.micro_batch import PreferenceData


@dataclass
class MovingReference:
    """The training data with the reference that each step has; all ranks ask for every step, in order.

    every: steps that a reference lasts. start: the data with the reference of the first of them.
    policy: the packed model, or what an engine has made of it, always with the weights of the moment.
    run_dir: keeps what was scored, for a run that is resumed between two changes.
    """

    every: int
    start: PreferenceData
    policy: nn.Module
    device: torch.device
    ranks: Ranks
    run_dir: Path
    seed: int
    total_steps: int
    global_pairs: int
    tokens_per_microbatch: int
    say: Callable[[str], None]
    _since: int = 0
    _now: PreferenceData | None = field(default=None, repr=False)

    def data(self, step: int) -> PreferenceData:
        """What step `step` (counted from 0) trains on; at a multiple of `every` the policy is scored first.

        Raises CheckpointError where a resumed run does not find what it had scored.
        """
        since = step - step % self.every
        if since == 0:
            return self.start
        if self._now is None or since != self._since or step == since:
            sums = self._score(since) if step == since else self._load(since)
            self._since, self._now = since, PreferenceData(self.start.examples, sums)
        return self._now

    def _batches(self, since: int) -> list[NDArray[np.int64]]:
        """The global batches of the steps that share a reference."""
        examples = len(self.start.examples)
        return [
            global_batch(step, seed=self.seed, examples=examples, global_pairs=self.global_pairs)
            for step in range(since, min(since + self.every, self.total_steps))
        ]

    @torch.no_grad()
    def _score(self, since: int) -> ReferenceSums:
        found: dict[int, NDArray[np.float64]] = {}
        for indices in self._batches(since):
            found.update(self._score_batch(indices))
        whole = {index: sums for share in self.ranks.gather(found) for index, sums in share.items()}
        shown = np.array(sorted(whole), dtype=np.int64)
        values = [whole[index] for index in shown.tolist()]
        sums = ReferenceSums(
            indices=shown,
            offsets=np.cumsum([0, *map(len, values)], dtype=np.int64),
            values=np.concatenate(values),
            data=data_digest(self.start.examples, shown),
        )
        if self.ranks.is_main:
            sums.save(self._file(since))
        self.say(f"reference: the policy after step {since}, {len(sums.values):,} responses scored")
        return sums

    def _score_batch(self, indices: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """This rank's share of a global batch, cut as the step will cut it: the same passes give the same bits."""
        sizes = [int(size) for size in self.start.examples.sizes[indices]]
        budget = self.tokens_per_microbatch
        for share in shares(sizes, tokens_per_microbatch=budget, rank=self.ranks.rank, ranks=self.ranks.size):
            together = [int(indices[place]) for place in share.places]
            row = pack([self.start.examples[index] for index in together]).to(self.device)
            sums = sum_by_response(row, self.policy(row).logps).cpu().numpy()
            if not share.idle:
                yield from zip(together, np.split(sums, np.cumsum(row.responses_per_example)[:-1]), strict=True)

    def _load(self, since: int) -> ReferenceSums:
        file = self._file(since)
        sums = self.ranks.broadcast(ReferenceSums.load(file) if self.ranks.is_main else None)
        assert sums is not None
        shown = np.unique(np.concatenate(self._batches(since)))
        if not sums.covers(shown):
            raise CheckpointError(
                f"This run was to end at another step, and its reference of step {since} was scored for that.",
                where=str(file),
                hint="leave epochs and max_steps as they were, or start a new run",
            )
        if sums.data != data_digest(self.start.examples, sums.indices):
            raise CheckpointError("The train data are not those this run began with.", where=str(file))
        return sums

    def _file(self, since: int) -> Path:
        return self.run_dir / f"reference_train-step-{since:08d}.safetensors"


def check_moving_reference(declaration: Declaration) -> None:
    """Raises ConfigError for a loss that a moving reference means nothing to."""
    if not declaration.needs_reference:
        problem, hint = "has no reference to move", "model.reference_sync_steps=null, or a loss with a reference"
    elif declaration.on_policy:
        problem, hint = "scores samples with a reference that stands still", "model.reference_sync_steps=null"
    else:
        return
    raise ConfigError(
        f"model.reference_sync_steps is set, and this loss {problem}.", where="model.reference_sync_steps", hint=hint
    )


def describe(every: int) -> str:
    """What it costs, in one line."""
    return (
        f"reference: replaced by the policy every {every:,} steps (TR-DPO), which scores each example again before it "
        "is shown: about a third more time, no more memory, and nothing that another run could use"
    )
