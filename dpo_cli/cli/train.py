"""dpo-train: check the configuration, make the run's folder, train.

Nothing heavy is imported before the configuration is right.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dpo_cli.cli.answers import answer, installed_version
from dpo_cli.cli.arguments import Arguments, parse_arguments
from dpo_cli.cli.heavy_imports import heavy_imports
from dpo_cli.config.secrets import mask_tokens
from dpo_cli.engine.environment import is_worker
from dpo_cli.engine.screen import LOG, LoggedBug, screen_to_ourselves
from dpo_cli.errors import EXIT_BAD_INPUT, ConfigError, DpoError, as_mendable

if TYPE_CHECKING:
    from dpo_cli.config.compose.composition import Request
    from dpo_cli.config.schema import Config

EXIT_BUG = 1
EXIT_KEYBOARD = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-train with these arguments, those of the process by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if is_worker():
        from dpo_cli.cli.worker import run_under_launcher

        return run_under_launcher(words)
    return exit_code_of(lambda: dispatch(parse_arguments(words)))


def exit_code_of(action: Callable[[], None], *, program: str = "dpo-train") -> int:
    """Do something for the user; whatever it raises is told on the screen and becomes an exit code."""
    try:
        action()
        sys.stdout.flush()
        return 0
    except DpoError as error:
        print(report(error, program=program), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return EXIT_KEYBOARD
    except BrokenPipeError:
        # Whoever read our output has left; a second complaint at exit would help nobody.
        sys.stdout = None
        return 0
    except OSError as error:
        mendable = as_mendable(error)
        if mendable is None:
            return _report_bug()
        print(report(mendable, program=program), file=sys.stderr)
        return mendable.exit_code
    except LoggedBug as bug:
        print(mask_tokens(f"{program}: {bug}\n{blame(ours=bug.is_ours)}"), file=sys.stderr)
        return EXIT_BUG
    except Exception:
        return _report_bug()


class Train(Protocol):
    def __call__(self, config: Config, *, before: Callable[[], None] | None = None) -> None:
        """Train in the run's folder, from where it stands; `before` runs once no other process can train there."""


def dispatch(arguments: Arguments, *, train: Train | None = None) -> None:
    """Do what the command line asks for. train: what is done with a checked configuration; trains, if left out."""
    train = train or _train
    from dpo_cli.cli.help import every_key, help_text
    from dpo_cli.config.shipped import GROUPS

    told = answer(
        arguments, program="dpo-train", groups=GROUPS, config="config", every_key=every_key, help_text=help_text
    )
    if told is not None:
        print(told, end="")
    elif arguments.resume is not None:
        _resume(arguments, train)
    elif arguments.sweep:
        from dpo_cli.cli.sweep.run import start_sweep

        start_sweep(_request(arguments), train=train, resume=_resumer(train))
    else:
        _start(arguments, train)


def _start(arguments: Arguments, train: Train) -> None:
    from dpo_cli.cli.launched import check_launch
    from dpo_cli.cli.run_folder import check_free, create_run_folder, discard_unbegun, unused_name
    from dpo_cli.config.check import check
    from dpo_cli.config.compose.composition import compose
    from dpo_cli.config.shipped import is_shipped

    request = _request(arguments)
    composition = compose(request)
    problems: list[DpoError] = []
    config = None
    try:
        config = check(composition)
    except ConfigError as error:
        problems += error.problems
    run_dir = composition.values.get("run_dir")
    unnamed = is_shipped(composition.place("run_dir") or "")
    makes_nothing = arguments.show_config or (config is not None and config.plan)
    if isinstance(run_dir, str) and run_dir and not unnamed and not makes_nothing:
        try:
            check_free(Path(run_dir))
        except ConfigError as error:
            problems.append(error)
    if problems or config is None:
        raise ConfigError(problems)
    if arguments.show_config:
        show_settings(config.as_dict())
        return
    if config.plan:
        _plan(config)
        return
    if unnamed:
        config = config.model_copy(update={"run_dir": unused_name(config.run_dir)})
    check_launch(config.hardware)
    folder = create_run_folder(config, request)
    try:
        train(config)
    except DpoError as error:
        if error.exit_code == EXIT_BAD_INPUT:
            discard_unbegun(folder)
        raise


def show_settings(settings: dict[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120), end="")


def _plan(config: Config) -> None:
    from dpo_cli.forecast.plan import plan_run
    from dpo_cli.forecast.report import plan_text

    print(plan_text(plan_run(config)))


def _resume(arguments: Arguments, train: Train) -> None:
    from dpo_cli.cli.launched import check_launch
    from dpo_cli.cli.run_folder import is_sweep, read_saved_run, save_resumed
    from dpo_cli.config.check import check
    from dpo_cli.config.compose.composition import compose
    from dpo_cli.config.diff import refuse_another_experiment
    from dpo_cli.config.loss_signature import import_path_includes

    if arguments.sweep:
        raise ConfigError(
            "resume= goes on with one run, and -m starts several.", where="command line", hint="leave -m out"
        )
    if any(word.lstrip("+").startswith("run_dir=") for word in arguments.overrides):
        raise ConfigError(
            "resume= and run_dir= name two folders for one run.",
            where="command line",
            hint="leave run_dir out; a run goes on in its own folder, which may have been moved",
        )
    folder = Path(str(arguments.resume))
    import_path_includes(Path.cwd())
    if is_sweep(folder):
        from dpo_cli.cli.sweep.run import resume_sweep

        resume_sweep(folder, arguments.overrides, train=train, resume=_resumer(train))
        return
    saved = read_saved_run(folder)
    request = replace(
        saved.request,
        overrides=(*saved.request.overrides, *arguments.overrides),
        config_dir=arguments.config_dir or saved.request.config_dir,
        config_name=arguments.config_name or saved.request.config_name,
    )
    try:
        config = check(compose(request, run_dir=str(folder)))
    except ConfigError as error:
        if saved.cwd != str(Path.cwd()):
            error.add_note(f"The run was started in {saved.cwd}, where its relative paths begin.")
        raise
    refuse_another_experiment(saved.settings, config.as_dict(), run_folder=str(folder))
    if arguments.show_config:
        show_settings(config.as_dict())
        return
    if config.plan:
        _plan(config)
        return
    check_launch(config.hardware)
    train(config, before=lambda: save_resumed(folder, config, request))


def _resumer(train: Train) -> Callable[[Path], None]:
    return lambda folder: _resume(parse_arguments([f"resume={folder}"]), train)


def _train(config: Config, *, before: Callable[[], None] | None = None) -> None:
    """In this process, or in workers that it starts and waits for."""
    from dpo_cli.cli.run_folder import exclusive

    folder = Path(config.run_dir)
    with exclusive(folder):
        if before is not None:
            before()
        if config.hardware.zero_stage is not None:
            from dpo_cli.cli.worker import launch_workers

            launch_workers(config, run_dir=folder)
            return
        with screen_to_ourselves(folder / LOG, level=config.log_level):
            # Only here, with the configuration checked, is torch imported.
            with heavy_imports(deepspeed=False):
                from dpo_cli.train.run import run_training

            run_training(config, run_dir=folder)


def _request(arguments: Arguments) -> Request:
    from dpo_cli.config.compose.composition import Request
    from dpo_cli.config.loss_signature import import_path_includes

    # A user's own loss lies where dpo-train is started.
    import_path_includes(Path.cwd())
    return Request(arguments.overrides, arguments.config_dir, arguments.config_name or "config")


def report(error: DpoError, *, program: str = "dpo-train") -> str:
    problems = error.problems if isinstance(error, ConfigError) else (error,)
    lines = [str(problem) for problem in problems]
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems:")
    lines += getattr(error, "__notes__", [])
    return mask_tokens(f"{program}: " + "\n".join(lines))


def _report_bug() -> int:
    traceback.print_exc()
    print(blame(ours=True), file=sys.stderr)
    return EXIT_BUG


def blame(*, ours: bool) -> str:
    """Whose a bug is."""
    if not ours:
        return "It lies in code of yours."
    return f"This is a bug of dpo-cli {installed_version()}, not of your input."


if __name__ == "__main__":
    raise SystemExit(main())
