"""A rank of dpo-sample or dpo-eval, started by the command: `python -m dpo_cli.cli.command_worker WORK_FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import yaml

from dpo_cli.cli.command import SETTINGS_FILE, Command
from dpo_cli.cli.eval import EVAL
from dpo_cli.cli.run_folder import sharing
from dpo_cli.cli.sample import SAMPLE
from dpo_cli.cli.train import report
from dpo_cli.config.loss_signature import import_path_includes
from dpo_cli.engine.outcome import Failure
from dpo_cli.engine.rank import run_as_rank
from dpo_cli.engine.watch import Watch
from dpo_cli.errors import as_mendable
from dpo_cli.train.stop import StopRequest

_COMMANDS = {command.config_name: command for command in (SAMPLE, EVAL)}


def main() -> NoReturn:
    work = Path(sys.argv[1])
    watch = Watch()
    watch.start()
    saved = yaml.safe_load((work / SETTINGS_FILE).read_text(encoding="utf-8"))
    command = _COMMANDS[saved["command"]]

    def show(failure: Failure) -> None:
        if failure.detail:
            print(failure.detail, file=sys.stderr)
        print(report(failure.as_error(), program=command.name), file=sys.stderr)

    with StopRequest().listening():
        run_as_rank(lambda: _run(command, saved["settings"], work), run_dir=work, watch=watch, show=show)


def _run(command: Command, settings: dict[str, object], work: Path) -> None:
    from dpo_cli.engine.backend import process_group
    from dpo_cli.train.device import choose_device

    import_path_includes(Path.cwd())
    config = command.rules().schema.model_validate(settings)
    try:
        with sharing(work), StopRequest().listening(), process_group(choose_device(config.hardware.device)) as ranks:
            command.run(config, work, ranks=ranks)
    except OSError as error:
        raise as_mendable(error) or error from None


if __name__ == "__main__":
    main()
