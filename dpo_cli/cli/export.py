"""dpo-export: a Hugging Face folder out of a run's checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_cli.cli.run_folder import read_saved_run
from dpo_cli.cli.train import exit_code_of
from dpo_cli.config.loss_signature import import_path_includes
from dpo_cli.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-export with these arguments, those of the process by default; returns the exit code."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _export(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpo-export",
        description="Write the model of a run's checkpoint as a Hugging Face folder; a finished run has RUN/final.",
    )
    parser.add_argument("run", type=Path, help="the run folder, which holds config.yaml and checkpoints/")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where to; default: RUN/export-step-00000050")
    parser.add_argument("--step", type=int, help="of which checkpoint; default: the newest that is whole")
    lora = parser.add_mutually_exclusive_group()
    lora.add_argument("--merge", action="store_true", default=None, help="LoRA: merged into the base's weights")
    lora.add_argument("--adapter-only", dest="merge", action="store_false", help="LoRA: the adapter alone")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    saved = read_saved_run(arguments.run)
    import_path_includes(Path.cwd())
    config = Config.model_validate(saved.settings)
    from dpo_cli.train.export_run import export_run

    written = export_run(
        config, run_dir=arguments.run, folder=arguments.to, step=arguments.step, merge=arguments.merge, say=print
    )
    print(written)


if __name__ == "__main__":
    raise SystemExit(main())
