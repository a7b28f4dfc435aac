"""dpo-report: one page about a run, or about several beside one another, with every figure and its numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_cli.cli.answers import installed_version
from dpo_cli.cli.train import exit_code_of
from dpo_cli.errors import ConfigError

_PROGRAM = "dpo-report"
_HELP = """\
dpo-report: one page about a run, or about several beside one another, with every figure and its numbers.

  dpo-report outputs/RUN                        writes outputs/RUN/report/report.html
  dpo-report outputs/SWEEP                      all runs of a sweep, compared, in outputs/SWEEP/report
  dpo-report outputs/A outputs/B out=ab         any runs, compared, in ab/

The page needs no network and no other file. figures/, beside it, holds each figure as SVG and PNG, its numbers as CSV.
Works on runs that are still training, were stopped or are damaged: what is missing is said at the top.

  out=FOLDER       where to; must not exist, be empty, or hold an earlier report, which is replaced
  --version, --help

Exit codes: 0 done, 2 bad input (nothing was written), 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run dpo-report with these arguments, those of the process by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(words), program=_PROGRAM)


def _dispatch(words: list[str]) -> None:
    if "--help" in words or "-h" in words:
        print(_HELP, end="")
        return
    if "--version" in words:
        print(f"dpo-cli {installed_version()}")
        return
    runs, out = _read(words)
    from dpo_cli.report import write
    from dpo_cli.report.folders import check_replaceable, run_folders

    folders = run_folders(runs)
    target = out or _default_folder(runs)
    check_replaceable(target)
    from dpo_cli.config.loss_signature import import_path_includes

    # A user's own loss lies where dpo-train was started.
    import_path_includes(Path.cwd())
    print(write(folders, target))


def _read(words: Sequence[str]) -> tuple[list[Path], Path | None]:
    runs, outs = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(f"There is no option {word}.", where="command line", hint=f"{_PROGRAM} --help")
        if equals and key == "out":
            outs.append(value)
        elif equals and not Path(word).exists():
            raise ConfigError(f"There is no setting {key}.", where="command line", hint="out=FOLDER is the only one")
        else:
            runs.append(Path(word))
    if not runs:
        raise ConfigError("No run is named.", where="command line", hint=f"{_PROGRAM} outputs/RUN")
    if len(outs) > 1 or outs == [""]:
        raise ConfigError("out= names one folder.", where="command line", hint="out=FOLDER")
    return runs, Path(outs[0]) if outs else None


def _default_folder(runs: Sequence[Path]) -> Path:
    if len(runs) > 1:
        raise ConfigError(
            "Several runs are named, and not where their report is to go.", where="out", hint="out=FOLDER"
        )
    return runs[0] / "report"


if __name__ == "__main__":
    raise SystemExit(main())
