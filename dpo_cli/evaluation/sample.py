"""dpo-sample: responses of a policy to prompts, and preference pairs made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_cli.atomic import replacing
from dpo_cli.config.commands import SampleConfig, names_a_file
from dpo_cli.data.example import Example
from dpo_cli.engine.ranks import Ranks, SoleRank
from dpo_cli.errors import ConfigError, DataError
from dpo_cli.evaluation.models import NamedModel, named_model, reference_of
from dpo_cli.evaluation.session import Drawn, ListedExamples, Session, session
from dpo_cli.policy.load import LoadedModel
from dpo_cli.rollout.answers import Answered, Drawing, judge
from dpo_cli.rollout.pairs import Pairs, as_row, best_worst_pairs, retokenised, rewarded, verified_pairs
from dpo_cli.rollout.questions import Encoder, Question, QuestionFile, QuestionSettings, read_questions
from dpo_cli.rollout.statistics import bootstrap_mean, pass_at_k
from dpo_cli.rollout.verify import Verifier, verifier_of

_AGAIN = "give the same command again: it goes on from there"


def run_sample(config: SampleConfig, work: Path, *, ranks: Ranks | None = None) -> None:
    """Write what `config` asks for to config.out, whole or not at all; unfinished work lies in `work` meanwhile.

    ranks: the processes that sample together, each of which calls this; None: this one alone.
    """
    with session(config, work, ranks or SoleRank(), again=_AGAIN) as here:
        _Sample(config, here).execute()


class _Sample:
    def __init__(self, config: SampleConfig, here: Session) -> None:
        self.config = config
        self.here = here

    def execute(self) -> None:
        config, here = self.config, self.here
        verifier = None if config.verifier is None else verifier_of(config.verifier)
        file = read_questions(config.prompts, self._reading(verifier))
        here.say(file.line())
        given = self._given(file)
        model = named_model(config.model)
        reference = beta = None
        if config.pairs == "best_worst":
            reference, beta = reference_of(model, config.model.reference), model.beta(config.beta)
        policy = here.load(model)
        encoder = here.encoder(policy, file.questions)
        drawing = Drawing.of(config.sampling, seed=config.seed, batch_tokens=config.batch_tokens)
        drawn = here.draw(policy, encoder, file.questions, drawing, folder="policy")
        answered = _judged(file.questions, drawn, encoder, verifier) if here.ranks.is_main else []
        pairs: Pairs | None = None
        if config.pairs == "verified" and here.ranks.is_main:
            pairs = verified_pairs(answered, limit=config.pairs_per_prompt, chosen=given)
        elif reference is not None and beta is not None:
            pairs = self._best_worst(answered, policy, reference, beta)
        if here.ranks.is_main:
            for line in _summary(answered, drawn, drawing, judged=verifier is not None):
                here.say(line)
            if pairs is not None:
                self._check_pairs(pairs, encoder)
            self._write(answered, pairs, encoder)
        here.ranks.barrier()

    def _reading(self, verifier: Verifier | None) -> QuestionSettings:
        config = self.config
        column = config.chosen if config.chosen is not None and not names_a_file(config.chosen) else None
        return QuestionSettings(
            split=config.split,
            subset=config.subset,
            columns=config.columns,
            prompt_template=config.prompt_template,
            chosen=column,
            on_bad_row=config.on_bad_row,
            limit=config.limit,
            verifier=verifier,
        )

    def _given(self, file: QuestionFile) -> dict[int, str | None] | None:
        """Chosen responses that are not sampled, by the numbers of the questions."""
        chosen = self.config.chosen
        if chosen is None:
            return None
        if not names_a_file(chosen):
            return {question.number: question.chosen for question in file.questions}
        by_prompt: dict[str, str | None] = {}
        for question in _read_chosen(chosen, self._reading(None)).questions:
            by_prompt.setdefault(_key(question), question.chosen)
        found = {question.number: by_prompt.get(_key(question)) for question in file.questions}
        matched = sum(text is not None for text in found.values())
        self.here.say(f"chosen: {matched:,} of {len(found):,} prompts have a response in {chosen}")
        if not matched:
            raise DataError(
                "No prompt of the file of chosen responses is a prompt that is sampled for.",
                where=chosen,
                hint="the same prompt_template, or the same text in the prompt column, in both files",
            )
        return found

    def _best_worst(
        self, answered: Sequence[Answered], policy: LoadedModel, reference: NamedModel, beta: float
    ) -> Pairs | None:
        here = self.here
        asked = here.ranks.broadcast([each for each in answered if len(rewarded(each)) > 1])
        examples = ListedExamples(
            [
                Example(each.prompt_ids, tuple(one.ids for one in rewarded(each)), origin=each.question.origin)
                for each in asked
            ]
        )
        rewards: dict[int, Sequence[float]] = {}
        if len(examples):
            ours = here.response_logps(policy, examples, what="policy")
            here.put_aside(policy)
            theirs = here.response_logps(here.load_reference(reference, policy), examples, what="reference")
            rewards = {
                each.question.number: (beta * (ours.of(place) - theirs.of(place))).tolist()
                for place, each in enumerate(asked)
            }
        return best_worst_pairs(answered, rewards, limit=self.config.pairs_per_prompt) if here.ranks.is_main else None

    def _check_pairs(self, pairs: Pairs, encoder: Encoder) -> None:
        for line in pairs.lines():
            self.here.say(line)
        if not pairs.pairs:
            raise DataError(
                "No prompt gave a pair.",
                where=f"pairs={self.config.pairs}",
                hint="more sampling.samples_per_prompt, a higher sampling.temperature, or other prompts; "
                "what was sampled is kept",
            )
        differing, total = retokenised(pairs.pairs, encoder)
        if differing:
            self.here.say(
                f"note: {differing:,} of {total:,} sampled responses in pairs are other tokens when their text is read "
                "again; training on them is not quite training on what was sampled"
            )

    def _write(self, answered: Sequence[Answered], pairs: Pairs | None, encoder: Encoder) -> None:
        config = self.config
        samples = (_as_sample(each) for each in answered)
        if pairs is None:
            write_jsonl(Path(config.out), samples)
        else:
            rows = (as_row(pair, chat=encoder.is_chat(pair.prompt)) for pair in pairs.pairs)
            if config.samples_out is not None:
                write_jsonl(Path(config.samples_out), samples)
            write_jsonl(Path(config.out), rows)
        self.here.say(f"written: {config.out}")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all, and never over a file that is there. Raises ConfigError where one has come meanwhile."""
    if path.exists():
        raise ConfigError(
            f"{path} has come to be there meanwhile.", where="out", hint="move it, and give the command again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _judged(questions: Sequence[Question], drawn: Drawn, encoder: Encoder, verifier: Verifier | None) -> list[Answered]:
    return [
        judge(
            question,
            drawn.prompts[question.number],
            drawn.responses.get(question.number, []),
            encoder,
            verifier,
        )
        for question in questions
    ]


def _read_chosen(path: str, settings: QuestionSettings) -> QuestionFile:
    """Rows of prompts with responses; the response's column is the first of these that reads."""
    problem: DataError | None = None
    for column in ("chosen", "response", "completion", "answer"):
        try:
            return read_questions(path, replace(settings, chosen=column, limit=None), where="chosen")
        except DataError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _key(question: Question) -> str:
    return json.dumps(question.prompt, ensure_ascii=False, sort_keys=True)


def _as_sample(answered: Answered) -> dict[str, Any]:
    return {
        "prompt": answered.question.prompt,
        "truth": answered.question.truth,
        "responses": [
            {"text": each.text, "tokens": each.ids.tolist(), "stopped": each.stopped, "right": each.right}
            for each in answered.responses
        ],
    }


def _summary(answered: Sequence[Answered], drawn: Drawn, drawing: Drawing, *, judged: bool) -> Iterator[str]:
    responses = [response for each in answered for response in each.responses]
    if judged:
        shares = [pass_at_k(drawing.samples, sum(each.right), 1) for each in answered]
        accuracy = bootstrap_mean(shares)
        line = f"right: {accuracy.value:.1%} (95% interval {accuracy.low:.1%} to {accuracy.high:.1%})"
        if drawing.samples > 1:
            k = drawing.samples
            line += f", pass@{k} {sum(pass_at_k(k, sum(each.right), k) for each in answered) / len(answered):.1%}"
        yield line
    stopped = sum(response.stopped for response in responses) / len(responses)
    tokens = sum(len(response.ids) for response in responses) / len(responses)
    line = f"responses: {len(responses):,}, {stopped:.1%} stopped by themselves, {tokens:.1f} tokens on average"
    if drawn.fresh_tokens:
        line += f"; {drawn.fresh_tokens / drawn.seconds:,.0f} tokens a second"
    yield line
