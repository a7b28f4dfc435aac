"""Task accuracy of a run: its greedy responses to held-out problems, before, during and after training, by a verifier.

Reward margins and accuracies say what a model thinks of given answers; only its own answers say what it can do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_cli.atomic import json_bytes, write_json
from dpo_cli.engine.interface import Engine
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import CheckpointError
from dpo_cli.policy.load import LoadedModel
from dpo_cli.rollout.answers import Drawing, check_room, encode_prompts, solve
from dpo_cli.rollout.generate import Sampling
from dpo_cli.rollout.questions import Encoder, Question, QuestionSettings, read_questions
from dpo_cli.rollout.statistics import Difference, paired_difference
from dpo_cli.rollout.verify import Verifier, verifier_of
from dpo_cli.train.console import RunConsole

METRIC = "task/accuracy"
# Of so many problems, the first ones, task.json keeps what the policy answered; so many characters of it.
_SHOWN, _LONGEST_TEXT = 8, 2000


@dataclass(frozen=True)
class TaskEvaluation:
    """Which problems a policy solves: all of them before and after training, the first `during` at every evaluation.

    The outcome before training is kept in the run folder, so that a resumed run need not find it again, unless it
    asks other problems.
    """

    policy: LoadedModel
    encoder: Encoder
    questions: Sequence[Question]
    verifier: Verifier
    drawing: Drawing
    during: int
    file: Path
    ranks: Ranks = field(default_factory=SoleRank)

    @classmethod
    def of(cls, settings: Any, policy: LoadedModel, run_dir: Path, ranks: Ranks, *, chat: bool) -> TaskEvaluation:
        """settings: the config's eval.task. chat: whether the training prompts are messages of the chat template.

        Raises DataError for problems that cannot be used, ConfigError for a verifier that cannot.
        """
        verifier = verifier_of(settings.verifier)
        reading = QuestionSettings(prompt_template=settings.prompt_template, limit=settings.limit, verifier=verifier)
        questions = read_questions(settings.problems, reading, where="eval.task.problems").questions
        prompts = [question.prompt for question in questions]
        encoder = Encoder(policy.tokenizer, policy.stop_token_ids, chat=True if chat else None, prompts=prompts)
        check_room(
            policy.model,
            [len(ids) for ids in encode_prompts(encoder, questions)],
            settings.max_new_tokens,
            key="eval.task.max_new_tokens",
        )
        return cls(
            policy=policy,
            encoder=encoder,
            questions=questions,
            verifier=verifier,
            drawing=Drawing(Sampling(settings.max_new_tokens, temperature=0), samples=1, seed=0),
            during=settings.during,
            file=run_dir / "task.json",
            ranks=ranks,
        )

    def before(self, engine: Engine, console: RunConsole) -> None:
        """The policy as it starts; a resumed run calls this before it restores the checkpoint."""
        if self.ranks.broadcast(self._kept()) is None:
            answers = self._heard()
            solved = self._solve(engine, self.questions, heard=answers)
            assert solved is not None
            if self.ranks.is_main:
                shown = [
                    {"prompt": question.prompt, "truth": question.truth, "before": answers[question.number]}
                    for question in self.questions[:_SHOWN]
                ]
                write_json(self.file, {"asked": self._asked, "before": solved.astype(int).tolist(), "shown": shown})
            console.say(f"task accuracy before training: {solved.mean():.1%} of {len(solved):,} problems")

    def evaluate(self, engine: Engine, *, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of the policy as it stands; none where nothing is asked during training.

        should_stop: whether this rank was asked to stop. None once any was: the problems so far are no measure.
        """
        if not self.during:
            return {}
        solved = self._solve(engine, self.questions[: self.during], should_stop=should_stop)
        return None if solved is None else {METRIC: float(solved.mean())}

    def after(self, engine: Engine, console: RunConsole) -> Difference:
        kept = self.ranks.broadcast(self._kept())
        if kept is None:
            raise CheckpointError(
                "The task accuracy before training is missing or of other problems.",
                where=str(self.file),
                hint="resume= the run folder, which finds it again",
            )
        answers = self._heard()
        solved = self._solve(engine, self.questions, heard=answers)
        assert solved is not None
        if self.ranks.is_main:
            # A run that began before answers were kept has none to set these beside.
            shown = [
                row | {"after": answers[question.number]}
                for row, question in zip(kept.get("shown", []), self.questions, strict=False)
            ]
            write_json(self.file, kept | {"after": solved.astype(int).tolist(), "shown": shown})
        difference = paired_difference(np.array(kept["before"], bool), solved)
        console.heading(describe_difference(difference, len(solved)))
        return difference

    @property
    def _asked(self) -> str:
        """Hexadecimal digits over everything but the policy that decides an outcome."""
        problems = [[question.prompt, question.truth] for question in self.questions]
        asked = [self.drawing.sampling.max_new_tokens, self.verifier.name, problems]
        return hashlib.blake2b(json_bytes(asked), digest_size=16).hexdigest()

    def _kept(self) -> dict[str, Any] | None:
        try:
            kept: dict[str, Any] = json.loads(self.file.read_bytes())
            return kept if kept["asked"] == self._asked else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _heard(self) -> dict[int, str]:
        """Room for the answers that are kept."""
        return {question.number: "" for question in self.questions[:_SHOWN]}

    def _solve(
        self,
        engine: Engine,
        questions: Sequence[Question],
        *,
        should_stop: Callable[[], bool] = lambda: False,
        heard: dict[int, str] | None = None,
    ) -> NDArray[np.bool_] | None:
        """(questions,) on every rank; each solves its share, and all are told what is in `heard`.

        None where a rank was stopped.
        """
        ranks = self.ranks
        with engine.whole_weights():
            mine = solve(
                self.policy.model,
                self.encoder,
                questions[ranks.rank :: ranks.size],
                self.verifier,
                self.drawing,
                stopping=should_stop,
                heard=heard,
            )
        if heard is not None:
            for told in ranks.gather(dict(heard)):
                heard.update((number, text[:_LONGEST_TEXT]) for number, text in told.items() if text)
        solved = np.zeros(len(questions), dtype=bool)
        for rank, share in enumerate(ranks.gather(mine)):
            if share is None:
                return None
            solved[rank :: ranks.size] = share
        return solved


def describe_difference(difference: Difference, problems: int) -> str:
    return (
        f"task accuracy on {problems:,} held-out problems: {difference.before_mean:.1%} before, "
        f"{difference.after_mean:.1%} after, {100 * difference.gain:+.1f} points "
        f"(95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
    )
