"""Where a command computes: its device and ranks, its screen, and how it hears that it is to stop."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_cli.config.commands import CommandConfig
from dpo_cli.data.cache import tokenizer_hash
from dpo_cli.data.example import Example, Examples, IntArray
from dpo_cli.engine.backend import Backend, Replicated
from dpo_cli.engine.ranks import Ranks
from dpo_cli.errors import DataError, Interrupted, OutOfMemory
from dpo_cli.evaluation.models import NamedModel, load_frozen_reference, load_policy
from dpo_cli.evaluation.partial import PartialResponses
from dpo_cli.policy.load import LoadedModel
from dpo_cli.policy.packed_model import score_examples
from dpo_cli.policy.self_test import packed_self_test
from dpo_cli.reference.identity import ModelIdentity, identity_of
from dpo_cli.reference.score import reference_sums
from dpo_cli.reference.store import open_store
from dpo_cli.reference.sums import ReferenceSums
from dpo_cli.rollout.answers import Drawing, check_room, draw, encode_prompts, pad_id_of, turns, with_room
from dpo_cli.rollout.questions import Encoder, Question
from dpo_cli.train.console import RunConsole
from dpo_cli.train.device import choose_device, describe, make_repeatable
from dpo_cli.train.parts import backend_of
from dpo_cli.train.reference_pass import release_memory
from dpo_cli.train.stop import StopRequest

# Keys of dpo-train's data section that these commands have as their own.
_KEYS = ("max_tokens", "on_long", "on_bad_row", "chat", "columns", "prompt_template", "split", "subset")


class ListedExamples:
    """Examples that are held in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self.sizes: IntArray = np.array([example.packed_tokens for example in examples], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


@dataclass(frozen=True)
class Drawn:
    """Responses to questions, by their numbers. fresh: those of this start, with the tokens and seconds they took.

    without_room: how many prompts leave no room for a response; those have none.
    """

    prompts: dict[int, IntArray]
    responses: dict[int, list[IntArray]]
    fresh_tokens: int
    seconds: float
    without_room: int


@dataclass(frozen=True)
class Session:
    """work: a folder for what is finished but not whole; all ranks see the same one."""

    config: CommandConfig
    work: Path
    ranks: Ranks
    backend: Backend
    console: RunConsole
    stop: StopRequest

    @property
    def store_dir(self) -> Path:
        return Path(self.config.store_dir).expanduser()

    def say(self, text: str) -> None:
        self.console.say(text)

    def load(self, model: NamedModel) -> LoadedModel:
        self.say(f"model: {model.shown}")
        return load_policy(model, self.backend)

    def load_reference(self, reference: NamedModel, policy: LoadedModel) -> LoadedModel:
        self.say(f"reference: {reference.shown}")
        return load_frozen_reference(reference, policy, self.backend)

    def draw(
        self,
        policy: LoadedModel,
        encoder: Encoder,
        questions: Sequence[Question],
        drawing: Drawing,
        *,
        folder: str,
    ) -> Drawn:
        """Responses of `policy` to all questions; every rank draws its share, and keeps it below `work`/`folder`.

        Raises Interrupted once a stop was requested and what is finished is kept.
        """
        encoded = encode_prompts(encoder, questions)
        lengths, longest = [len(ids) for ids in encoded], drawing.sampling.max_new_tokens
        check_room(policy.model, lengths, longest, key="sampling.max_new_tokens")
        fitting = with_room(policy.model, lengths, longest)
        prompts = {questions[place].number: encoded[place] for place in fitting}
        if len(fitting) < len(questions):
            self.say(
                f"{len(questions) - len(fitting):,} prompts are too long to leave room for {longest:,} new tokens, and "
                "get no response"
            )
        partial = PartialResponses(self.work / folder)
        identity = identity_of(policy, store_dir=self.store_dir, ranks=self.ranks)
        if self.ranks.is_main:
            partial.begin(_settings(identity, policy, encoder, prompts, drawing))
        self.ranks.barrier()
        kept = partial.read()
        # All have read before any writes, so that all divide the same rest.
        self.ranks.barrier()
        missing = {number: ids for number, ids in prompts.items() if number not in kept}
        if kept:
            self.say(f"{len(kept):,} prompts were answered before, and are kept")
        seconds = self._draw_missing(policy, missing, drawing, partial)
        self.ranks.barrier()
        if self.config.out is not None:
            self.stop.kept = "All prompts were answered, and are kept."
        responses = partial.read()
        tokens = sum(len(ids) for number in missing for ids in responses[number])
        every = {question.number: ids for question, ids in zip(questions, encoded, strict=True)}
        return Drawn(every, responses, tokens, seconds, len(questions) - len(fitting))

    def _draw_missing(
        self,
        policy: LoadedModel,
        missing: Mapping[int, IntArray],
        drawing: Drawing,
        partial: PartialResponses,
    ) -> float:
        """Seconds that the slowest rank took."""
        if not missing:
            return 0.0
        by_length = sorted(missing, key=lambda number: (-len(missing[number]), number))
        mine = {number: missing[number] for number in by_length[self.ranks.rank :: self.ranks.size]}
        began, done, writer = time.perf_counter(), 0, partial.writer()
        with (
            self.backend.whole(policy.model),
            self.stop.deferred(),
            self.console.progress("answering", len(mine)),
        ):
            for numbers in turns(mine, drawing):
                if self.stop.requested:
                    break
                drawn = draw(
                    policy.model,
                    {number: mine[number] for number in numbers},
                    drawing,
                    stop_token_ids=policy.stop_token_ids,
                    pad_id=pad_id_of(policy.tokenizer, policy.stop_token_ids),
                )
                writer.add(drawn)
                done += len(numbers)
                self.console.advance(done)
        seconds = time.perf_counter() - began
        stopped = self.stop.agreed(self.ranks)
        finished = sum(self.ranks.gather(done))
        if stopped and finished < len(missing):
            kept = "are kept" if self.config.out is not None else "are lost; with out=FILE they would be kept"
            self.stop.check(f"{finished:,} of {len(missing):,} prompts were answered, and {kept}.")
        return max(self.ranks.gather(seconds))

    def response_logps(self, model: LoadedModel, examples: Examples, *, what: str) -> ReferenceSums:
        """Summed log-probs of all responses, from the store as far as they are there."""
        store = open_store(self.store_dir, identity_of(model, store_dir=self.store_dir, ranks=self.ranks))
        packed = model.packed()
        with (
            self.backend.scoring(packed, model.dtype) as scoring,
            self.stop.deferred(),
            self.console.progress_once_begun(f"scoring with the {what}") as progress,
        ):
            packed_self_test(packed, vocabulary=len(model.tokenizer), where=str(model.folder))
            return reference_sums(
                examples,
                make_score=lambda: lambda together: score_examples(scoring, together),
                store=store,
                tokens_per_batch=self.config.batch_tokens,
                report=lambda line: self.say(line.replace("reference:", f"{what}:", 1)),
                progress=progress,
                should_stop=lambda: self.stop.agreed(self.ranks),
                ranks=self.ranks,
            )

    def put_aside(self, model: LoadedModel) -> None:
        """Free the device of a model that is not computed with any more."""
        if self.config.hardware.zero_stage != 3:
            model.model.to("cpu")
        release_memory()

    def encoder(self, policy: LoadedModel, questions: Sequence[Question]) -> Encoder:
        return Encoder(
            policy.tokenizer,
            policy.stop_token_ids,
            chat=self.config.chat,
            prompts=[question.prompt for question in questions],
        )


@contextmanager
def session(config: CommandConfig, work: Path, ranks: Ranks, *, again: str) -> Iterator[Session]:
    """again: the command that goes on after a stop. Raises Interrupted (exit code 75) after a signal."""
    stop = StopRequest()
    stop.kept = "Nothing was finished yet."
    try:
        with stop.listening():
            device = choose_device(config.hardware.device)
            make_repeatable(seed=config.seed, deterministic=False)
            console = RunConsole()
            console.say(f"device: {describe(device, ranks.size)}")
            yield Session(config, work, ranks, _backend(config, device, ranks), console, stop)
    except Interrupted as stopped:
        stopped.hint = again
        raise
    except DataError as error:
        error.hint = _own_keys(error.hint)
        error.where = _own_keys(error.where)
        error.message = _own_keys(error.message) or ""
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"The GPU's memory is full: {str(error).splitlines()[0]}",
            hint=f"a smaller batch_tokens than {config.batch_tokens:,}",
        ) from error


def _own_keys(text: str | None) -> str | None:
    """The data room speaks of dpo-train's keys; here they are no section's."""
    return text and re.sub(r"\bdata\.train\b", "data", re.sub(rf"\bdata\.({'|'.join(_KEYS)})\b", r"\1", text))


def _backend(config: CommandConfig, device: torch.device, ranks: Ranks) -> Backend:
    # Of what ZeRO partitions, a model that is not trained has weights alone.
    return backend_of(config.hardware, device, ranks) if config.hardware.zero_stage == 3 else Replicated(device, ranks)


def _settings(
    identity: ModelIdentity,
    policy: LoadedModel,
    encoder: Encoder,
    prompts: Mapping[int, IntArray],
    drawing: Drawing,
) -> dict[str, Any]:
    """Everything that decides responses, by names that an error message can show."""

    asked = hashlib.blake2b(digest_size=16)
    for number, ids in sorted(prompts.items()):
        asked.update(f"{number}:{len(ids)}:".encode() + ids.astype("<i4").tobytes())
    return {
        "model": identity.key,
        "tokenizer": tokenizer_hash(policy.tokenizer),
        "stop tokens": sorted(encoder.stop_token_ids),
        "prompts": asked.hexdigest(),
        "sampling.max_new_tokens": drawing.sampling.max_new_tokens,
        "sampling.temperature": drawing.sampling.temperature,
        "sampling.top_p": drawing.sampling.top_p,
        "sampling.top_k": drawing.sampling.top_k,
        "sampling.samples_per_prompt": drawing.samples,
        "seed": drawing.seed,
    }
