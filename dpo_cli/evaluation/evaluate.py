"""dpo-eval: what a policy can do, how it ranks given responses, and whether two policies differ."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dpo_cli.config.commands import EvalConfig
from dpo_cli.data.arrow_store import StoredExamples
from dpo_cli.data.prepare import prepare_data
from dpo_cli.data.settings import DataSettings
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import DataError
from dpo_cli.evaluation.models import NamedModel, named_model, named_reference, reference_of
from dpo_cli.evaluation.results import (
    SavedResult,
    TaskResult,
    compared,
    comparison_as_dict,
    comparison_table,
    estimates_table,
    read_result,
    task_result,
    task_table,
    write_result,
)
from dpo_cli.evaluation.sample import write_jsonl
from dpo_cli.evaluation.session import Session, session
from dpo_cli.losses.types import ExampleKind
from dpo_cli.policy.load import LoadedModel
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.rollout.answers import Drawing, judge
from dpo_cli.rollout.questions import QuestionFile, QuestionSettings, read_questions
from dpo_cli.rollout.statistics import Estimate, bootstrap_mean, wilson
from dpo_cli.rollout.verify import Verifier, verifier_of

_AGAIN = "give the same command again: it goes on from there"
_NOTHING_KEPT = "give the same command again"


def run_eval(config: EvalConfig, work: Path, *, ranks: Ranks | None = None) -> None:
    """Find out what `config` asks for, show it, and write it to config.out; unfinished work lies in `work` meanwhile.

    ranks: the processes that evaluate together, each of which calls this; None: this one alone.
    """
    again = _AGAIN if config.out is not None else _NOTHING_KEPT
    with session(config, work, ranks or SoleRank(), again=again) as here:
        evaluation = _Evaluation(config, here)
        if config.mode == "task":
            evaluation.task()
        elif config.mode == "compare":
            evaluation.compare()
        else:
            evaluation.preferences()


class _Evaluation:
    def __init__(self, config: EvalConfig, here: Session) -> None:
        self.config = config
        self.here = here

    def task(self) -> None:
        config, here = self.config, self.here
        verifier = verifier_of(config.verifier)
        settings = QuestionSettings(
            split=config.split,
            subset=config.subset,
            columns=config.columns,
            prompt_template=config.prompt_template,
            on_bad_row=config.on_bad_row,
            limit=config.limit,
            verifier=verifier,
        )
        file = read_questions(config.prompts, settings)
        here.say(file.line())
        model = named_model(config.model)
        other: SavedResult | NamedModel | None = None
        if config.compare:
            name = config.compare[0]
            other = read_result(Path(name)) if Path(name).is_file() else named_reference(model.settings, name)
        result = self._answer(model, file, verifier, folder="policy")
        content: dict[str, Any] = {} if result is None else result.as_dict()
        if result is not None:
            self._show(task_table(result))
        if isinstance(other, NamedModel):
            second = self._answer(other, file, verifier, folder="compared")
            if second is not None:
                self._show(task_table(second))
                content["compared"] = second.as_dict()
                other = SavedResult.of(second, second.model)
        if result is not None and isinstance(other, SavedResult):
            # What is evaluated is asked how it differs from what it is compared with.
            mine = SavedResult.of(result, result.model)
            found = compared(other, mine)
            content["comparison"] = comparison_as_dict(other, mine, found)
            self._show(comparison_table(other, mine, found))
        self._write(content)

    def compare(self) -> None:
        first, second = (read_result(Path(name)) for name in self.config.compare)
        found = compared(first, second)
        self._show(comparison_table(first, second, found))
        self._write({"mode": "compare", **comparison_as_dict(first, second, found)})

    def preferences(self) -> None:
        """Modes preferences and rewards."""
        config, here = self.config, self.here
        model = named_model(config.model)
        reference, beta = reference_of(model, config.model.reference), model.beta(config.beta)
        policy = here.load(model)
        examples = self._examples(policy)
        ours = here.response_logps(policy, examples, what="policy")
        here.put_aside(policy)
        theirs = here.response_logps(here.load_reference(reference, policy), examples, what="reference")
        if not here.ranks.is_main:
            return
        if config.mode == "rewards":
            assert config.out is not None
            write_jsonl(Path(config.out), _reward_rows(examples, ours, theirs, policy, beta))
            here.say(f"written: {config.out}, {len(examples):,} rows")
            return
        estimates = _preference_estimates(examples, ours, theirs, beta, seed=config.seed)
        shares = ("rewards/accuracies", "reference/accuracies")
        title = f"{model.shown} against {reference.shown}: {len(examples):,} pairs, beta {beta:g}"
        self._show(estimates_table(title, estimates, shares=shares))
        found = {name: estimate.as_dict() for name, estimate in estimates.items()}
        names = {"mode": "preferences", "model": model.shown, "reference": reference.shown}
        self._write({**names, "beta": beta, "pairs": len(examples), **found})

    def _answer(self, model: NamedModel, file: QuestionFile, verifier: Verifier, *, folder: str) -> TaskResult | None:
        """On the main rank, what became of the questions."""
        config, here = self.config, self.here
        policy = here.load(model)
        encoder = here.encoder(policy, file.questions)
        drawing = Drawing.of(config.sampling, seed=config.seed, batch_tokens=config.batch_tokens)
        drawn = here.draw(policy, encoder, file.questions, drawing, folder=folder)
        here.put_aside(policy)
        if not here.ranks.is_main:
            return None
        answered = [
            judge(each, drawn.prompts[each.number], drawn.responses.get(each.number, []), encoder, verifier)
            for each in file.questions
        ]
        return task_result(
            answered,
            model=model.shown,
            verifier=verifier.name,
            sampling=config.sampling.model_dump(),
            pass_at=config.pass_at,
            maj_at=config.maj_at,
            seed=config.seed,
        )

    def _examples(self, policy: LoadedModel) -> StoredExamples:
        """The rows as dpo-train would read them, tokenised once by the main rank and then read from the cache."""
        config, ranks = self.config, self.here.ranks
        kind: ExampleKind = "pair" if config.mode == "preferences" else "ranked"
        settings = DataSettings(
            train=config.data,
            split=config.split,
            subset=config.subset,
            max_tokens=config.max_tokens,
            on_long=config.on_long,
            on_bad_row=config.on_bad_row,
            chat=config.chat,
            columns=config.columns,
            prompt_template=config.prompt_template,
        )
        found: StoredExamples | None = None
        for turn in (True, False):
            if turn == ranks.is_main:
                prepared = prepare_data(
                    settings,
                    policy.tokenizer,
                    kind=kind,
                    stop_token_ids=policy.stop_token_ids,
                    seed=config.seed,
                    store_dir=self.here.store_dir,
                )
                found = prepared.train
                for line in prepared.report.lines():
                    self.here.say(line.replace("train:", "data:", 1))
            ranks.barrier()
        assert found is not None
        if found[0].reference is not None:
            raise DataError(
                "The rows bring log-probs of a reference, which would stand for those of both models.",
                where="data",
                hint="leave those columns out of the file",
            )
        return found

    def _show(self, table: Table) -> None:
        if self.here.ranks.is_main:
            self.here.console.show(table)

    def _write(self, content: dict[str, Any]) -> None:
        if self.config.out is not None and self.here.ranks.is_main:
            write_result(Path(self.config.out), content)
            self.here.say(f"written: {self.config.out}")


def _preference_estimates(
    examples: StoredExamples, ours: ReferenceSums, theirs: ReferenceSums, beta: float, *, seed: int
) -> dict[str, Estimate]:
    """Names as in training. Equal rewards are no right ranking."""
    count = len(examples)
    policy = np.stack([ours.of(index) for index in range(count)])
    reference = np.stack([theirs.of(index) for index in range(count)])
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "rewards/accuracies": wilson(int((margins > 0).sum()), count),
        "rewards/margins": bootstrap_mean(margins, seed=seed),
        "rewards/chosen": bootstrap_mean(rewards[:, 0], seed=seed),
        "rewards/rejected": bootstrap_mean(rewards[:, 1], seed=seed),
        "logps/chosen": bootstrap_mean(policy[:, 0], seed=seed),
        "logps/rejected": bootstrap_mean(policy[:, 1], seed=seed),
        "reference/accuracies": wilson(int((reference[:, 0] > reference[:, 1]).sum()), count),
    }


def _reward_rows(
    examples: StoredExamples, ours: ReferenceSums, theirs: ReferenceSums, policy: LoadedModel, beta: float
) -> Iterator[dict[str, Any]]:
    """Responses best first, as the data rank them."""
    decode = policy.tokenizer.decode
    for index in range(len(examples)):
        example = examples[index]
        logps, reference = ours.of(index), theirs.of(index)
        yield {
            "row": example.origin,
            "prompt": str(decode(example.prompt.tolist())),
            "responses": [
                {
                    "text": str(decode(ids.tolist(), skip_special_tokens=True)),
                    "tokens": len(ids),
                    "reward": beta * float(logps[number] - reference[number]),
                    "logp": float(logps[number]),
                    "reference_logp": float(reference[number]),
                }
                for number, ids in enumerate(example.responses)
            ],
        }
