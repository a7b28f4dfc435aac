"""What every command answers at once: help, version, what there is to choose from, completion for the shell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from dpo_cli.cli.arguments import Arguments


def answer(
    arguments: Arguments,
    *,
    program: str,
    groups: Sequence[str],
    config: str,
    every_key: Callable[[], str],
    help_text: Callable[[], str] | None = None,
) -> str | None:
    """The text to print; None where something else was asked for.

    config: the file of conf/ that it starts from. every_key: the page with every key; help_text: a shorter one.
    """
    if arguments.help and help_text is not None:
        return help_text()
    if arguments.help or arguments.help_all:
        return every_key()
    if arguments.version:
        return f"dpo-cli {installed_version()}\n"
    if arguments.completion is not None:
        from dpo_cli.cli.completion import script

        return script(arguments.completion)
    if arguments.show is not None:
        from dpo_cli.cli.show import show

        return show(
            arguments.show,
            program=program,
            groups=groups,
            config=config,
            own=arguments.config_dir,
            every_key=every_key,
        )
    return None


def installed_version() -> str:
    try:
        return version("dpo-cli")
    except PackageNotFoundError:
        return "(not installed)"
