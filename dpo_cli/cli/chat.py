"""dpo-chat: ask a policy, on the screen, beside the model it is compared with."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_cli.cli.answers import answer
from dpo_cli.cli.arguments import Arguments, parse_arguments
from dpo_cli.cli.command import OPTIONS
from dpo_cli.cli.heavy_imports import heavy_imports
from dpo_cli.cli.train import exit_code_of, show_settings
from dpo_cli.errors import ConfigError

if TYPE_CHECKING:
    from dpo_cli.config.commands import ChatConfig

_PROGRAM = "dpo-chat"
_INTRODUCTION = """\
dpo-chat: ask a policy, on the screen, beside the model it is compared with.

  dpo-chat outputs/RUN                                  a conversation; Ctrl-C ends a reply, Ctrl-D the session
  dpo-chat outputs/RUN "Why is the sky blue?"           one question, one reply
  dpo-chat outputs/RUN beside=reference temperature=0   what the run was trained against answers as well
  cat question.txt | dpo-chat my-model                  the whole of a pipe is one question

RUN is a run folder of dpo-train (its final model or, without one, that of its newest checkpoint), a model folder or a
hub name; the same as model=local model.path=RUN.
"""
_EXIT_CODES = """
Typed in a conversation: /reset forgets what was said, /help tells the keys.

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C outside a conversation.
"""
# What begins an override word: a key, and an equals sign without a blank before it.
_OVERRIDE = re.compile(r"[~+]{0,2}[\w.@/-]+=|~")


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-chat with these arguments, those of the process by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(words), program=_PROGRAM)


def _dispatch(words: list[str]) -> None:
    arguments = parse_arguments(words, program=_PROGRAM)
    told = answer(arguments, program=_PROGRAM, groups=("model",), config="chat", every_key=_help)
    if told is not None:
        print(told, end="")
        return
    config = _checked(arguments)
    if arguments.show_config:
        show_settings(config.as_dict())
        return
    question = config.prompt
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().rstrip("\n")
        if not question:
            raise ConfigError(
                "Nothing came from standard input, and no question was given.",
                where="prompt",
                hint=f'{_PROGRAM} RUN "your question"',
            )
    # Only here, with the configuration checked, is torch imported.
    with heavy_imports(deepspeed=False):
        from dpo_cli.evaluation.chat import chat

    chat(config, question)


def _help() -> str:
    from dpo_cli.cli.help import page

    options = OPTIONS.format(doing="asking", config_name="chat")
    files = [("chat.yaml", ""), ("model/_base.yaml", "model")]
    return page(_INTRODUCTION + options, ("model",), files, _EXIT_CODES)


def _checked(arguments: Arguments) -> ChatConfig:
    from dpo_cli.config.check import check_by
    from dpo_cli.config.command_checks import CHAT
    from dpo_cli.config.compose.composition import Request, compose

    if arguments.sweep or arguments.resume is not None:
        raise ConfigError(f"{_PROGRAM} asks one policy: there is no -m and no resume=.", where="command line")
    plain = [word for word in arguments.overrides if not _OVERRIDE.match(word) and not word.startswith("-")]
    if len(plain) > 2:
        raise ConfigError(
            f"{_PROGRAM} takes a policy and a question, and {len(plain)} words are neither keys nor options.",
            where="command line",
            hint=f'{_PROGRAM} RUN "the question in quotes"',
        )
    overrides = [word for word in arguments.overrides if word not in plain]
    if plain:
        quoted = plain[0].replace("\\", "\\\\").replace("'", "\\'")
        overrides.insert(0, f"model.path='{quoted}'")
    request = Request(
        tuple(overrides), arguments.config_dir, arguments.config_name or "chat", groups=CHAT.groups, program=_PROGRAM
    )
    config: ChatConfig = check_by(CHAT, compose(request))
    if len(plain) < 2:
        return config
    if config.prompt is not None:
        raise ConfigError("The question is given twice.", where="prompt", hint="leave prompt= out")
    # Not through an override: a question may hold anything.
    return config.model_copy(update={"prompt": plain[1]})


if __name__ == "__main__":
    raise SystemExit(main())
