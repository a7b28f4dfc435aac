"""Ask a policy questions: its responses, and what a verifier makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_cli.data.example import IntArray
from dpo_cli.data.rows import BadRow
from dpo_cli.errors import DataError
from dpo_cli.rollout.generate import BATCH_TOKENS, Sampling, generate
from dpo_cli.rollout.noise import stream
from dpo_cli.rollout.questions import Encoder, Question
from dpo_cli.rollout.verify import Verifier

# Batches between two looks at whether a stop was requested, and between two writings of what is finished.
_BATCHES_A_TURN = 4


@dataclass(frozen=True)
class Response:
    """ids: as sampled, the stop token included. stopped: it ended by itself, and was not cut at max_new_tokens.

    answer, right: the verifier's; None where there is none.
    """

    text: str
    ids: IntArray
    stopped: bool
    answer: str | None = None
    right: bool | None = None


@dataclass(frozen=True)
class Answered:
    """A question with its responses; none where the prompt leaves no room for them."""

    question: Question
    prompt_ids: IntArray
    responses: tuple[Response, ...]

    @property
    def right(self) -> list[bool]:
        return [bool(response.right) for response in self.responses]


@dataclass(frozen=True)
class Drawing:
    """How responses are drawn. A response is a function of (seed, question, number of the sample) and the model."""

    sampling: Sampling
    samples: int
    seed: int
    batch_tokens: int = BATCH_TOKENS

    @classmethod
    def of(cls, settings: Any, *, seed: int, batch_tokens: int) -> Drawing:
        """settings: a config's `sampling` section."""
        return cls(Sampling.of(settings), settings.samples_per_prompt, seed, batch_tokens)


def encode_prompts(encoder: Encoder, questions: Sequence[Question]) -> list[IntArray]:
    """Raises DataError naming the row whose prompt the chat template cannot render."""
    found = []
    for question in questions:
        try:
            found.append(encoder.prompt(question.prompt))
        except BadRow as problem:
            raise DataError(f"A prompt cannot be used: {problem}.", where=question.origin) from None
    return found


def with_room(model: PreTrainedModel, prompt_tokens: Sequence[int] | IntArray, max_new_tokens: int) -> list[int]:
    """Places of the prompts, each so many tokens long, that leave room for a response among the model's positions."""
    positions = positions_of(model)
    return [
        place for place, tokens in enumerate(prompt_tokens) if positions is None or tokens + max_new_tokens <= positions
    ]


def check_room(
    model: PreTrainedModel, prompt_tokens: Sequence[int] | IntArray, max_new_tokens: int, *, key: str
) -> None:
    """Raise DataError where no prompt leaves room for a response. key: the setting that says how long one may be."""
    if not len(prompt_tokens) or with_room(model, prompt_tokens, max_new_tokens):
        return
    shortest, positions = int(min(prompt_tokens)), positions_of(model) or 0
    room = positions - shortest
    raise DataError(
        f"The model has {positions:,} positions: no prompt leaves room for {max_new_tokens:,} new tokens; the shortest "
        f"has {shortest:,} tokens.",
        where=key,
        hint=f"{key}={max(1, room * 3 // 4)}" if room > 0 else "a model with a longer context",
    )


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model's config says it can tell apart by their place; None where it does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def turns(prompts: Mapping[int, IntArray], drawing: Drawing) -> Iterator[list[int]]:
    """Cut questions, by their numbers, into the portions that `draw` takes at a time; long prompts first.

    What will not fit in memory then fails at once, and prompts of equal length are drawn together.
    """
    waiting = sorted(prompts, key=lambda number: (-len(prompts[number]), number))
    while waiting:
        together = drawing.batch_tokens // (len(prompts[waiting[0]]) + drawing.sampling.max_new_tokens)
        count = max(1, _BATCHES_A_TURN * max(1, together) // drawing.samples)
        yield waiting[:count]
        waiting = waiting[count:]


def draw(
    model: PreTrainedModel,
    prompts: Mapping[int, IntArray],
    drawing: Drawing,
    *,
    stop_token_ids: frozenset[int],
    pad_id: int,
) -> dict[int, list[IntArray]]:
    """Responses to prompts, by the numbers of their questions."""
    numbers = list(prompts)
    responses = generate(
        model,
        [prompts[number] for number in numbers],
        drawing.sampling,
        samples_per_prompt=drawing.samples,
        streams=None if drawing.sampling.greedy else [stream(drawing.seed, number) for number in numbers],
        stop_token_ids=stop_token_ids,
        pad_id=pad_id,
        batch_tokens=drawing.batch_tokens,
    )
    return dict(zip(numbers, responses, strict=True))


def pad_id_of(tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int]) -> int:
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else min(stop_token_ids)


def judge(
    question: Question,
    prompt_ids: IntArray,
    responses: Sequence[IntArray],
    encoder: Encoder,
    verifier: Verifier | None,
) -> Answered:
    """Raises DataError naming the row where the user's verifier fails."""
    stops = np.array(sorted(encoder.stop_token_ids))
    read = [
        Response(text, ids, stopped=bool(np.isin(ids[-1], stops)))
        for text, ids in zip(encoder.texts(prompt_ids, responses), responses, strict=True)
    ]
    if verifier is not None:
        assert question.truth is not None
        read = [
            replace(
                response,
                answer=verifier.answer(response.text),
                right=verifier.is_right(response.text, question.truth, where=question.origin),
            )
            for response in read
        ]
    return Answered(question, prompt_ids, tuple(read))


def solve(
    model: PreTrainedModel,
    encoder: Encoder,
    questions: Sequence[Question],
    verifier: Verifier,
    drawing: Drawing,
    *,
    stopping: Callable[[], bool] = lambda: False,
    heard: dict[int, str] | None = None,
) -> list[bool] | None:
    """Whether the first response to each question is right. A prompt without room for a response is not solved.

    heard: by the numbers of questions, is given the responses to those that it has.
    None where `stopping` said so before the end.
    """
    prompts = encode_prompts(encoder, questions)
    fitting = with_room(model, [len(ids) for ids in prompts], drawing.sampling.max_new_tokens)
    solved = [False] * len(questions)
    for places in turns({place: prompts[place] for place in fitting}, drawing):
        if stopping():
            return None
        drawn = draw(
            model,
            {questions[place].number: prompts[place] for place in places},
            drawing,
            stop_token_ids=encoder.stop_token_ids,
            pad_id=pad_id_of(encoder.tokenizer, encoder.stop_token_ids),
        )
        for place in places:
            question = questions[place]
            answered = judge(question, prompts[place], drawn[question.number][:1], encoder, verifier)
            solved[place] = answered.right[0]
            if heard is not None and question.number in heard:
                heard[question.number] = answered.responses[0].text
    return solved
