"""What a run gained: task accuracy before and after, on the same problems."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dpo_cli.atomic import json_bytes, write_json
from dpo_cli.engine.interface import Engine
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import CheckpointError
from dpo_cli.paths import resolve_path
from dpo_cli.policy.load import LoadedModel
from dpo_cli.rollout.exact_match import Difference, Problem, exact_match, load_problems, paired_difference
from dpo_cli.train.console import RunConsole


@dataclass(frozen=True)
class TaskAccuracy:
    """Exact match on a file of problems, before and after training, on the very same problems.

    encode: from a prompt's text to token ids, as the training data saw prompts.
    The outcome before training is kept in the run folder, so that a resumed run need not find it again, unless it
    asks other problems.
    """

    problems: Sequence[Problem]
    max_new_tokens: int
    encode: Callable[[str], Sequence[int]]
    file: Path
    ranks: Ranks = field(default_factory=SoleRank)

    @classmethod
    def of(cls, settings: Any, encode: Callable[[str], Sequence[int]], run_dir: Path, ranks: Ranks) -> TaskAccuracy:
        """settings: the config's data.exact_match. Raises DataError for a problems file that cannot be used."""
        return cls(
            problems=load_problems(resolve_path(settings.problems), limit=settings.limit),
            max_new_tokens=settings.max_new_tokens,
            encode=encode,
            file=run_dir / "exact_match.json",
            ranks=ranks,
        )

    def before(self, policy: LoadedModel, engine: Engine, console: RunConsole) -> None:
        """policy: as it starts; a resumed run calls this before it restores the checkpoint."""
        if self.ranks.broadcast(self._kept()) is None:
            solved = self._solve(policy, engine)
            if self.ranks.is_main:
                write_json(self.file, {"asked": self._asked, "before": solved.astype(int).tolist()})
            console.say(f"exact match before training: {solved.mean():.1%} of {len(solved):,} problems")

    def after(self, policy: LoadedModel, engine: Engine, console: RunConsole) -> Difference:
        kept = self.ranks.broadcast(self._kept())
        if kept is None:
            raise CheckpointError(
                "The task accuracy before training is missing or of other problems.",
                where=str(self.file),
                hint="resume= the run folder, which finds it again",
            )
        solved = self._solve(policy, engine)
        if self.ranks.is_main:
            write_json(self.file, kept | {"after": solved.astype(int).tolist()})
        difference = paired_difference(np.array(kept["before"], bool), solved)
        console.heading(describe_difference(difference, len(solved)))
        return difference

    @property
    def _asked(self) -> str:
        """Hexadecimal digits over everything but the policy that decides an outcome."""
        problems = [(problem.prompt, str(problem.answer)) for problem in self.problems]
        return hashlib.blake2b(json_bytes([self.max_new_tokens, problems]), digest_size=16).hexdigest()

    def _kept(self) -> dict[str, Any] | None:
        try:
            kept: dict[str, Any] = json.loads(self.file.read_bytes())
            return kept if kept["asked"] == self._asked else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _solve(self, policy: LoadedModel, engine: Engine) -> NDArray[np.bool_]:
        """Every rank solves its share, and all hear of all."""
        ranks = self.ranks
        with engine.whole_weights():
            mine = exact_match(
                policy.model,
                policy.tokenizer,
                self.problems[ranks.rank :: ranks.size],
                max_new_tokens=self.max_new_tokens,
                stop_token_ids=policy.stop_token_ids,
                encode=self.encode,
            )
        solved = np.zeros(len(self.problems), dtype=bool)
        for rank, share in enumerate(ranks.gather(mine)):
            solved[rank :: ranks.size] = share
        return solved


def prompt_encoder(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> Callable[[str], Sequence[int]]:
    """From a problem's text to token ids, as training saw its prompts: as a user's message, or as plain text."""

    def as_message(prompt: str) -> Sequence[int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = tokenizer(str(text), add_special_tokens=False).input_ids
        return ids

    def as_it_stands(prompt: str) -> Sequence[int]:
        ids: list[int] = tokenizer(prompt).input_ids
        # Encoder-style tokenizers close what they encode; a prompt must stay open.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids

    return as_message if chat else as_it_stands


def describe_difference(difference: Difference, problems: int) -> str:
    return (
        f"exact match on {problems:,} held-out problems: {difference.before_mean:.1%} before, "
        f"{difference.after_mean:.1%} after, {100 * difference.gain:+.1f} points "
        f"(95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    )
