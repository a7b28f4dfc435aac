"""The ranks of a distributed run, whoever starts them.

`python -m dpo_cli.cli.worker RUN_DIR` is a rank that dpo-train itself has started. Under torchrun or deepspeed every
rank is a dpo-train: rank 0 checks the command line and makes the run folder, the others wait for its name.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dpo_cli.cli.arguments import Arguments, parse_arguments
from dpo_cli.cli.heavy_imports import heavy_imports
from dpo_cli.cli.run_folder import exclusive, read_saved_run, sharing
from dpo_cli.cli.train import dispatch, exit_code_of, report
from dpo_cli.config.loss_signature import import_path_includes
from dpo_cli.config.schema import Config
from dpo_cli.engine.environment import rank, stop_seconds, take_local_rank
from dpo_cli.engine.outcome import Failure, RankFiles
from dpo_cli.engine.rank import run_as_rank
from dpo_cli.engine.screen import LOG, screen_to_ourselves
from dpo_cli.engine.watch import Watch
from dpo_cli.errors import CheckpointError, ConfigError, DpoError, Interrupted, as_mendable
from dpo_cli.train.stop import StopRequest


def train_as_worker(config: Config, run_dir: Path) -> None:
    """What every rank does, in a process that was just started as one."""
    with heavy_imports(deepspeed=True):
        from dpo_cli.engine.backend import process_group
        from dpo_cli.engine.rendezvous import hand_over
        from dpo_cli.train.device import choose_device
        from dpo_cli.train.run import run_training
        from dpo_cli.train.run_data import fill_cache

    def prepare() -> str:
        fill_cache(config)
        return "prepared"

    device = choose_device(config.hardware.device)
    # Before the ranks meet: however long tokenising takes, no collective waits for it.
    hand_over(prepare)
    with process_group(device) as ranks:
        run_training(config, run_dir=run_dir, ranks=ranks)


def launch_workers(config: Config, *, run_dir: Path) -> None:
    """Train in processes of this machine's own; raises what the first of them that fails raises."""
    from dpo_cli.engine.launch import launch, workers_on

    workers = workers_on(config.hardware.device, wanted=config.hardware.num_workers)
    command = [sys.executable, "-P", "-u", "-m", "dpo_cli.cli.worker", str(run_dir)]
    try:
        launch(command, workers=workers, run_dir=run_dir, stop_seconds=stop_seconds())
    except Interrupted as stopped:
        # A rank that was stopped before it began to train knows nothing of resuming.
        stopped.hint = stopped.hint or f"dpo-train resume={run_dir}"
        raise


def run_under_launcher(words: list[str]) -> int:
    """dpo-train as one of the ranks that torchrun or deepspeed has started; returns only without having trained."""
    words = take_local_rank(words)
    return _run_main(words) if rank() == 0 else _run_other(words)


def _run_main(words: list[str]) -> int:
    arguments: list[Arguments] = []
    handed_over = False
    watch = Watch()

    def run() -> None:
        arguments.append(_parse(words))
        if not arguments[0].shows_only:
            watch.start()
        with StopRequest().listening():
            dispatch(arguments[0], train=train)

    def train(config: Config, *, before: Callable[[], None] | None = None) -> None:
        nonlocal handed_over
        folder = Path(config.run_dir)
        with exclusive(folder):
            if before is not None:
                before()
            RankFiles(folder).clear()
            if config.hardware.zero_stage is not None:
                from dpo_cli.engine.rendezvous import hand_over

                handed_over = True
                hand_over(lambda: str(folder.absolute()))
            _run_rank(config, folder, watch)

    code = exit_code_of(run)
    if arguments and not arguments[0].shows_only and not handed_over:
        from dpo_cli.engine.rendezvous import tell_exit_code

        # The user knows already, of an error or a plan; the others are told so that they end with the same exit code.
        tell_exit_code(code)
    return code


def _run_other(words: list[str]) -> int:
    """Rank 0 does the talking."""
    try:
        if _parse(words).shows_only:
            return 0
        watch = Watch()
        watch.start()
        with StopRequest().listening():
            from dpo_cli.engine.rendezvous import receive

            folder = Path(receive())
            if not folder.is_dir():
                raise CheckpointError(
                    f"The run folder that rank 0 has made is not there on the machine of rank {rank()}.",
                    where=str(folder),
                    hint="run_dir=FOLDER on a disk that all machines share",
                )
            _run_rank(_saved_config(folder), folder, watch)
    except CheckpointError as error:
        print(report(error), file=sys.stderr)
        return error.exit_code
    except DpoError as error:
        # Rank 0 leaves at the same time, and its launcher then terminates the others.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return error.exit_code


def _run_rank(config: Config, folder: Path, watch: Watch) -> NoReturn:
    run_as_rank(lambda: _train(config, folder), run_dir=folder, watch=watch, show=_show)


def _train(config: Config, folder: Path) -> None:
    try:
        log = folder / LOG if rank() == 0 else RankFiles(folder).log(rank())
        with (
            sharing(folder),
            screen_to_ourselves(log, level=config.log_level),
            StopRequest().listening(),
        ):
            train_as_worker(config, folder)
    except OSError as error:
        raise as_mendable(error) or error from None


def _parse(words: list[str]) -> Arguments:
    arguments = parse_arguments(words)
    if arguments.sweep:
        raise ConfigError(
            "-m starts several runs, and a launcher's processes are those of one.",
            where="command line",
            hint="dpo-train -m hardware=...: it starts the processes of each run by itself",
        )
    return arguments


def _saved_config(folder: Path) -> Config:
    import_path_includes(Path.cwd())
    return Config.model_validate(read_saved_run(folder).settings)


def _show(failure: Failure) -> None:
    if failure.detail:
        print(failure.detail, file=sys.stderr)
    print(report(failure.as_error()), file=sys.stderr)


def main() -> NoReturn:
    """A rank of a launch by dpo-train, which has made the run folder and waits."""
    folder = Path(sys.argv[1])
    watch = Watch()
    watch.start()

    with StopRequest().listening():
        run_as_rank(lambda: _train(_saved_config(folder), folder), run_dir=folder, watch=watch, show=_show)


if __name__ == "__main__":
    main()
