"""A conversation with a policy on the screen: replies appear as they are drawn, a second model's below them."""

from __future__ import annotations

import string
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from dpo_cli.config.command_checks import BESIDE_REFERENCE
from dpo_cli.config.commands import ChatConfig, run_settings_file
from dpo_cli.config.schema import Config
from dpo_cli.data.example import IntArray
from dpo_cli.data.rows import BadRow, Messages, Prompt
from dpo_cli.data.templates import fill_template, template_fields
from dpo_cli.engine.backend import Backend, Replicated
from dpo_cli.errors import ConfigError, DataError, OutOfMemory
from dpo_cli.evaluation.models import (
    NamedModel,
    load_frozen_reference,
    load_policy,
    named_model,
    named_reference,
    read_run,
    reference_of,
)
from dpo_cli.inspection.show import visible
from dpo_cli.policy.load import LoadedModel
from dpo_cli.rollout.answers import positions_of
from dpo_cli.rollout.generate import Sampling, stream_tokens
from dpo_cli.rollout.noise import stream
from dpo_cli.rollout.questions import Encoder
from dpo_cli.train.device import choose_device, describe
from dpo_cli.train.export_run import checkpoint_model
from dpo_cli.train.final import FINAL

_RESET, _HELP = "/reset", "/help"
_KEYS = f"{_RESET} forgets what was said; Ctrl-C ends a reply, Ctrl-D the session"
# What a decoder shows for bytes that do not make a character yet.
_UNFINISHED = "\ufffd"


class Speaker:
    """A model, and the conversation as it knows it.

    chat: through the chat template, with all that was said before; else every question is a prompt by itself.
    template: for plain text, what the question is put into.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        chat: bool,
        system: str | None,
        template: str | None,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self._model = loaded.model.eval()
        self._encoder = Encoder(loaded.tokenizer, loaded.stop_token_ids, chat=chat, prompts=[])
        self._chat, self._template, self._sampling, self._seed = chat, template, sampling, seed
        self._beginning: Messages = [{"role": "system", "content": system}] if system else []
        self._said = list(self._beginning)
        self._asked = 0

    def reset(self) -> None:
        self._said = list(self._beginning)

    def reply(self, question: str, *, notice: Callable[[str], None]) -> Iterator[str]:
        """The reply in pieces, as it is drawn; however it ends, what came of it is part of the conversation.

        notice: gets a sentence where the reply did not end by itself. Raises DataError where a prompt cannot be made of
        the question, or leaves no room for a reply.
        """
        said: Messages = [*self._said, {"role": "user", "content": question}]
        prompt = self._prompt(said if self._chat else question)
        positions = positions_of(self._model)
        room = self._sampling.max_new_tokens if positions is None else positions - len(prompt)
        if room < 1:
            raise DataError(
                f"The model has {positions:,} positions, and the prompt takes {len(prompt):,}.",
                where="prompt",
                hint=f"{_RESET}, where a conversation has grown too long; or a shorter question",
            )
        longest = min(room, self._sampling.max_new_tokens)
        tokens = stream_tokens(
            self._model,
            prompt,
            replace(self._sampling, max_new_tokens=longest),
            stream=stream(self._seed, self._asked),
            stop_token_ids=self._encoder.stop_token_ids,
        )
        self._asked += 1
        ids: list[int] = []
        shown = text = ""
        try:
            for token in tokens:
                ids.append(token)
                text = self._encoder.texts(prompt, [np.array(ids, dtype=np.int32)])[0]
                if not text.endswith(_UNFINISHED):
                    yield text[len(shown) :]
                    shown = text
            yield text[len(shown) :]
        finally:
            self._said = [*said, {"role": "assistant", "content": text}]
        if not ids or ids[-1] not in self._encoder.stop_token_ids:
            limit = "max_new_tokens" if self._sampling.max_new_tokens <= room else "the model's positions end there"
            notice(f"(cut after {longest:,} tokens: {limit})")

    def _prompt(self, said: Prompt) -> IntArray:
        try:
            if isinstance(said, str) and self._template is not None:
                said = fill_template(self._template, {template_fields(self._template)[0]: said})
            return self._encoder.prompt(said)
        except BadRow as problem:
            raise DataError(f"The question cannot be put to the model: {problem}.", where="prompt") from None


def chat(config: ChatConfig, question: str | None) -> None:
    """Answer `question`, or all that is asked on the terminal where it is None; replies go to standard output.

    Raises ConfigError, ModelError and DataError before the first reply; in a conversation, what is wrong with a
    question is told and the next one awaited.
    """
    try:
        speakers = _speakers(config)
        if question is not None:
            _answer(speakers, question)
            return
        _converse(speakers)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"The GPU's memory is full: {str(error).splitlines()[0]}", hint="device=cpu, or a smaller max_new_tokens"
        ) from error


def _speakers(config: ChatConfig) -> dict[str, Speaker]:
    device = choose_device(config.device)
    _tell(f"device: {describe(device)}")
    backend = Replicated(device)
    policy, loaded = _load(config, backend)
    speakers = {"policy": _speaker(config, loaded, policy)}
    if config.beside is not None:
        if config.beside == BESIDE_REFERENCE:
            other = reference_of(policy, config.model.reference)
            _tell(f"reference: {other.shown}")
            speakers["reference"] = _speaker(config, load_frozen_reference(other, loaded, backend), policy)
        else:
            other = named_reference(config.model, config.beside)
            _tell(f"beside: {other.shown}")
            speakers[config.beside] = _speaker(config, load_policy(other, backend), policy)
    return speakers


def _load(config: ChatConfig, backend: Backend) -> tuple[NamedModel, LoadedModel]:
    """The policy that model.path names; of a run without a final model, that of its newest checkpoint."""
    file = run_settings_file(config.model.path)
    if file is None or (file.parent / FINAL).is_dir():
        model = named_model(config.model)
        _tell(f"policy: {model.shown}")
        return model, load_policy(model, backend)
    run = read_run(config.model.path)
    assert run is not None
    settings = Config.model_validate(run)
    loaded, step = checkpoint_model(settings, run_dir=file.parent, step=None, device=backend.device, say=_tell)
    model = NamedModel(config.model, f"step {step:,} of {file.parent}", run)
    _tell(f"policy: {model.shown}")
    return model, loaded


def _speaker(config: ChatConfig, loaded: LoadedModel, policy: NamedModel) -> Speaker:
    data = policy.run["data"] if policy.run is not None else {}
    chat = config.chat if config.chat is not None else data.get("chat")
    if chat is None:
        chat = bool(loaded.tokenizer.chat_template)
    if config.system is not None and not chat:
        raise ConfigError("Without a chat template there is no system's message.", where="system", hint="chat=true")
    template = config.prompt_template or _with_one_field(data.get("prompt_template"))
    template = None if template is None or chat else _decoded(template)
    _tell("  chat template" if chat else f"  plain text{'' if template is None else f', as {template!r}'}")
    return Speaker(
        loaded, chat=chat, system=config.system, template=template, sampling=Sampling.of(config), seed=config.seed
    )


def _with_one_field(template: str | None) -> str | None:
    if template is None:
        return None
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name}
    return template if len(fields) == 1 else None


def _decoded(template: str) -> str:
    from dpo_cli.data.settings import decode_escapes

    decoded = decode_escapes(template)
    if len(set(template_fields(decoded))) > 1:
        raise ConfigError("Of a question one field can be filled.", where="prompt_template", hint="name one {field}")
    return decoded


def _converse(speakers: dict[str, Speaker]) -> None:
    with suppress(ImportError):  # absent on some systems; lines are then typed without editing
        import readline  # noqa: F401

    _tell(_KEYS)
    while True:
        try:
            _turn(speakers, input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            _tell(f"\n{_KEYS}")


def _turn(speakers: dict[str, Speaker], typed: str) -> None:
    """Do what one line asks for; what is wrong with a question is told."""
    if typed.strip() == _RESET:
        for speaker in speakers.values():
            speaker.reset()
    elif typed.strip() == _HELP:
        _tell(_KEYS)
    elif typed.strip():
        try:
            _answer(speakers, typed, stoppable=True)
        except DataError as error:
            _tell(str(error))


def _answer(speakers: dict[str, Speaker], question: str, *, stoppable: bool = False) -> None:
    """Print every speaker's reply. stoppable: Ctrl-C ends the reply that is being written, and nothing else."""
    for name, speaker in speakers.items():
        if len(speakers) > 1:
            print(f"[{name}]")
        try:
            for piece in speaker.reply(question, notice=_notice):
                print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not stoppable:
                raise
        print()


def _notice(sentence: str) -> None:
    print(f" {sentence}", end="", file=sys.stderr, flush=True)


def _tell(text: str) -> None:
    """Beside the replies, which alone go to standard output."""
    print(text, file=sys.stderr, flush=True)
