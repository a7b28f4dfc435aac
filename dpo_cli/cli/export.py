"""dpo-export: a Hugging Face folder out of a run's checkpoint."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_cli.cli.run_folder import read_saved_run
from dpo_cli.cli.train import exit_code_of
from dpo_cli.config.loss_signature import import_path_includes
from dpo_cli.config.schema import Config
from dpo_cli.errors import ConfigError

# Of weights, as model.dtype names them; known here so that --help needs no torch.
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-export with these arguments, those of the process by default; returns the exit code."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _export(arguments), program="dpo-export")


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
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights; default: as they were trained")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="of a weight file, in MB or GB; default: 5GB",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="send it to an empty hub repository of this name, private")
    parser.add_argument("--public", action="store_true", help="with --push: for everyone to see")
    return parser


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[MG]B", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return text


def _export(arguments: argparse.Namespace) -> None:
    saved = read_saved_run(arguments.run)
    import_path_includes(Path.cwd())
    config = Config.model_validate(saved.settings)
    if arguments.public and arguments.push is None:
        raise ConfigError("--public is for what is sent to the hub.", where="--public", hint="--push OWNER/NAME")
    from dpo_cli.policy.publish import check_may_publish, publish

    if arguments.push is not None:
        check_may_publish(arguments.push)
    from dpo_cli.train.export_run import export_run

    written = export_run(
        config,
        run_dir=arguments.run,
        folder=arguments.to,
        step=arguments.step,
        merge=arguments.merge,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        say=print,
    )
    print(written)
    if arguments.push is not None:
        print(publish(written, arguments.push, private=not arguments.public))


if __name__ == "__main__":
    raise SystemExit(main())
