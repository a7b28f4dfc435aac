"""dpo-train -m: one run for every combination of the values given, in folders numbered inside one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_cli.cli.run_folder import check_free, create_run_folder, create_sweep_folder, unused_name
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Composition, Request, compose
from dpo_cli.config.compose.overrides import expand_sweep, parse_overrides
from dpo_cli.config.schema import Config
from dpo_cli.config.secrets import mask
from dpo_cli.config.shipped import is_shipped
from dpo_cli.errors import EXIT_ENDED_EARLY, ConfigError, DpoError

Train = Callable[[Config], None]


def sweep(request: Request, *, train: Train) -> None:
    """Check every job, then run them one after the other; the first that fails ends the sweep.

    One that health.stop_on has ended early has not failed.

    Raises ConfigError when any job's settings are wrong, before any of them starts, and whatever a job raises.
    """
    overrides, problems = parse_overrides(request.overrides, sweep=True)
    if problems:
        readable = tuple(str(override.input_line) for override in overrides if not override.is_sweep_override())
        problems += _problems_of(compose(replace(request, overrides=readable)))
        raise ConfigError(_distinct(problems))
    jobs = expand_sweep(overrides)
    folder, configs = _checked(request, jobs)
    create_sweep_folder(folder, request, jobs)
    for number, (config, job) in enumerate(zip(configs, jobs, strict=True)):
        print(f"\n#{number} of {len(jobs)}: {mask(' '.join(job))}", flush=True)
        create_run_folder(config, replace(request, overrides=tuple(job)))
        try:
            train(config)
        except (DpoError, KeyboardInterrupt) as error:
            if isinstance(error, DpoError) and error.exit_code == EXIT_ENDED_EARLY:
                print(error, file=sys.stderr)
                continue
            left = len(jobs) - number - 1
            print(f"The sweep stops at job {number}, before {left} more.", file=sys.stderr)
            print(f"Go on with this job: dpo-train resume={config.run_dir}", file=sys.stderr)
            raise


def _checked(request: Request, jobs: Sequence[list[str]]) -> tuple[Path, list[Config]]:
    problems: list[DpoError] = []
    configs: list[Config] = []
    parent: Path | None = None
    for number, job in enumerate(jobs):
        composition = compose(replace(request, overrides=tuple(job)))
        # The first job decides, so that ${now:} is asked once for all of them.
        parent = parent or _parent_folder(composition)
        composition = replace(composition, values={**composition.values, "run_dir": str(parent / str(number))})
        try:
            configs.append(check(composition))
        except ConfigError as error:
            problems += error.problems
    if any(config.plan for config in configs):
        problems.append(
            ConfigError("plan=true tells of one run, and -m starts several.", where="plan", hint="leave -m out")
        )
    assert parent is not None
    try:
        check_free(parent)
    except ConfigError as error:
        problems.append(error)
    if problems:
        raise ConfigError(_distinct(problems))
    return parent, configs


def _parent_folder(composition: Composition) -> Path:
    named = str(composition.values.get("run_dir", ""))
    return Path(unused_name(f"{named}_sweep") if is_shipped(composition.place("run_dir") or "") else named)


def _problems_of(composition: Composition) -> list[DpoError]:
    try:
        check(composition)
    except ConfigError as error:
        return list(error.problems)
    return []


def _distinct(problems: Sequence[DpoError]) -> list[DpoError]:
    return list({str(problem): problem for problem in problems}.values())
