"""How held-out pairs are ranked one by one: eval_pairs.jsonl says who they are, eval_logps.jsonl what the policy says.

Means hide which pairs are learnt late, lost again or never won; dpo-report shows them. The log-probs are those that
the evaluation computes in any case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_cli.atomic import replacing
from dpo_cli.batch.transfer import to_device
from dpo_cli.data.example import Example
from dpo_cli.engine.ranks import Ranks
from dpo_cli.errors import CheckpointError
from dpo_cli.train.metrics_log import MetricsLog
from dpo_cli.train.micro_batch import MicroBatch, PreferenceData
from dpo_cli.train.objective import Objective, ResponseLogps

PAIRS = "eval_pairs.jsonl"
LOGPS = "eval_logps.jsonl"
# Bounds of the two files, some megabytes each at most: pairs, evenly spaced where there are more; characters of a text,
# of a prompt the last ones; evaluations, evenly spaced where there are more, the first and the last among them.
MOST_PAIRS = 2000
LONGEST_TEXT = 2000
MOST_EVALUATIONS = 64
# A hundred-thousandth of a nat: what a margin is read by, at a third of the digits.
_DECIMALS = 5


class Tokenizer(Protocol):
    def decode(self, token_ids: list[int], /) -> Any: ...


@dataclass
class EvalPairs:
    """Watches evaluations of held-out pairs: of ranked responses, the best and the worst.

    kept: (pairs,) ascending indices of those that are recorded. every: steps between recorded evaluations.
    All ranks call `watch` and `record`; the main one alone writes.
    """

    log: MetricsLog
    kept: NDArray[np.int64]
    every: int
    ranks: Ranks
    _seen: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        data: PreferenceData | None,
        objective: Objective,
        tokenizer: Tokenizer,
        log: MetricsLog,
        ranks: Ranks,
        *,
        eval_every: int,
        total_steps: int,
    ) -> EvalPairs | None:
        """Write who the pairs are, unless an earlier start of the run has. None where nothing held out is a pair."""
        if data is None or not len(data.examples) or objective.declaration.kind not in ("pair", "ranked"):
            return None
        count = len(data.examples)
        kept = np.unique(np.linspace(0, count - 1, min(count, MOST_PAIRS)).round().astype(np.int64))
        file = log.path.with_name(PAIRS)
        if ranks.is_main and not file.exists():
            _write_lines(file, [_described(data, int(index), tokenizer) for index in kept])
        # Those between the first and the last; a run may have none.
        evaluations = max(1, total_steps // eval_every if eval_every else 0)
        return cls(log, kept, max(1, eval_every) * -(-evaluations // MOST_EVALUATIONS), ranks)

    def watch(self, micro: MicroBatch, logps: ResponseLogps) -> None:
        """Keep the first and the last response's log-probs of every example, where they are: copying would wait."""
        ends = torch.tensor(logps.per_example).cumsum(0)
        both = to_device(torch.stack((ends - torch.tensor(logps.per_example), ends - 1)), logps.policy.device)
        self._seen.append((micro.indices, logps.policy.detach()[both]))

    def forget(self) -> None:
        """Drop what an evaluation that was cut short has seen."""
        self._seen = []

    def record(self, step: int, *, last: bool) -> None:
        """Write one line of the evaluation that was watched, if it is one of those to be kept."""
        seen, self._seen = self._seen, []
        if step % self.every and not last:
            return
        indices = np.array([index for part, _ in seen for index in part], dtype=np.int64)
        values = torch.cat([part for _, part in seen], dim=1).cpu().numpy() if seen else np.zeros((2, 0))
        wanted = np.isin(indices, self.kept)
        shares = self.ranks.gather((indices[wanted], values[:, wanted]))
        if not self.ranks.is_main:
            return
        order = np.argsort(np.concatenate([part for part, _ in shares]))
        chosen, rejected = np.concatenate([part for _, part in shares], axis=1)[:, order]
        self.log.append_row({"step": step, "split": "eval", "chosen": _rounded(chosen), "rejected": _rounded(rejected)})


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [round(value, _DECIMALS) if np.isfinite(value) else None for value in values.tolist()]


def _described(data: PreferenceData, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A line of eval_pairs.jsonl. tokens: as the loss counts them; length: without weights."""
    example = data.examples[index]
    chosen, rejected = example.responses[0], example.responses[-1]
    reference = None if data.reference is None else data.reference.of(index)[[0, -1]].tolist()
    return {
        "pair": index,
        "origin": example.origin,
        "prompt": _last_part(str(tokenizer.decode(example.prompt.tolist()))),
        "chosen": _first_part(str(tokenizer.decode(chosen.tolist()))),
        "rejected": _first_part(str(tokenizer.decode(rejected.tolist()))),
        "prompt_length": len(example.prompt),
        "length": [len(chosen), len(rejected)],
        "tokens": _counted(example),
        "reference": reference,
    }


def _counted(example: Example) -> list[float]:
    if example.weights is None:
        return [float(len(example.responses[0])), float(len(example.responses[-1]))]
    return [float(example.weights[0].sum()), float(example.weights[-1].sum())]


def _first_part(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} […]"


def _last_part(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"[…] {text[-LONGEST_TEXT:]}"


def _write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as opened:
            opened.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    except OSError as error:
        raise CheckpointError(f"the held-out pairs cannot be written: {error.strerror}.", where=str(file)) from error
