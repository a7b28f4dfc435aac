"""A sweep from its command line to the table of what came of it; one that was stopped goes on from its folder"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.override_parser.types import Override

from dpo_cli.cli.run_folder import (
    REQUEST_FILE,
    check_free,
    create_run_folder,
    create_sweep_folder,
    exclusive,
    read_saved_sweep,
    save_resumed_sweep,
    unused_name,
)
from dpo_cli.cli.sweep.compare import Row, compare, show
from dpo_cli.cli.sweep.jobs import SUCCEEDED, Grid, Job, Outcomes, Source
from dpo_cli.config.check import SWEEPING, check, check_by
from dpo_cli.config.compose.composition import Composition, Request, compose
from dpo_cli.config.compose.overrides import expand_sweep, intervals_are_for_searches, parse_overrides
from dpo_cli.config.schema import Config, SweepConfig
from dpo_cli.config.secrets import mask
from dpo_cli.config.shipped import is_shipped
from dpo_cli.config.sweep_checks import sweep_settings
from dpo_cli.errors import EXIT_BAD_INPUT, EXIT_NON_FINITE, ConfigError, DpoError
from dpo_cli.report import write as write_report

# What trains in a folder that was just made, and what goes on with a run from where its folder stands.
Train = Callable[[Config], None]
Resume = Callable[[Path], None]
# Of a second Ctrl-C, which no job of a sweep answers for.
EXIT_KEYBOARD = 130
# Exit codes that say something of the values a search has drawn; memory that does not suffice is bad input.
_JUDGED = (*SUCCEEDED, EXIT_BAD_INPUT, EXIT_NON_FINITE)


@dataclass(frozen=True)
class Sweep:
    """What was asked for. settings: the section `sweep`. overrides: all words, those with several values included."""

    request: Request
    overrides: Sequence[Override]
    settings: SweepConfig
    seed: int

    @classmethod
    def of(cls, request: Request) -> Sweep:
        """Raises ConfigError holding every problem of the words."""
        overrides, problems = parse_overrides(request.overrides, sweep=True)
        shared = tuple(str(override.input_line) for override in overrides if not override.is_sweep_override())
        composition = compose(replace(request, overrides=shared))
        settings = sweep_settings(composition.values)
        if settings is not None and settings.sampler == "grid":
            problems += intervals_are_for_searches(overrides)
        # What is missing here may be what is swept, so that only the words and the sweep itself are judged as yet.
        faults = _problems_of(composition)
        problems += [fault for fault in faults if str(fault.where).startswith("sweep.")]
        if problems or settings is None:
            raise ConfigError(_distinct([*problems, *faults]))
        seed = composition.values.get("seed")
        return cls(request, overrides, settings, seed if isinstance(seed, int) else 0)

    @property
    def is_search(self) -> bool:
        return self.settings.sampler != "grid"

    def grid(self) -> list[Job]:
        swept = [place for place, item in enumerate(self.overrides) if item.is_sweep_override()]
        jobs = []
        for number, words in enumerate(expand_sweep(self.overrides)):
            pairs = [words[place].partition("=") for place in swept]
            jobs.append(Job(number, tuple(words), tuple((key, value) for key, _, value in pairs)))
        return jobs

    def probes(self) -> list[list[str]]:
        """Words of jobs that between them take every value of a list and both ends of every range."""
        from dpo_cli.cli.sweep.search import distribution, ends, key_of, words_of

        swept = {key_of(item): ends(item) for item in self.overrides if item.is_sweep_override()}
        if not swept:
            raise ConfigError(
                "A search needs a key that has a range.", where="command line", hint="'loss.beta=interval(0.01,1)'"
            )
        for item in self.overrides:
            if item.is_sweep_override():
                distribution(item)
        first = {key: values[0] for key, values in swept.items()}
        drawn = [first, *({**first, key: value} for key, values in swept.items() for value in values[1:])]
        return [list(words_of(self.overrides, values)) for values in drawn]


def start_sweep(request: Request, *, train: Train, resume: Resume) -> None:
    """Check every job, or every end of a search's ranges, before the first begins; then run all of them.

    Raises ConfigError when any job's settings are wrong, and what a job raises that ends the sweep.
    """
    sweep = Sweep.of(request)
    jobs = [] if sweep.is_search else sweep.grid()
    folder = _checked(request, sweep.probes() if sweep.is_search else [list(job.words) for job in jobs])
    create_sweep_folder(folder, request)
    with exclusive(folder, doing="running this sweep"):
        _run(sweep, folder, train, resume)


def resume_sweep(folder: Path, words: Sequence[str], *, train: Train, resume: Resume) -> None:
    """Go on with the jobs that have not ended well. words: settings of the sweep itself that are other ones now."""
    foreign = [word for word in words if not word.lstrip("+").startswith("sweep.")]
    if foreign:
        raise ConfigError(
            f"{mask(foreign[0])} would make another sweep of it.",
            where="command line",
            hint="only sweep.* may change, as sweep.trials; a new sweep takes what is scored already from the store",
        )
    request = read_saved_sweep(folder)
    request = replace(request, overrides=(*request.overrides, *words))
    sweep = Sweep.of(request)
    with exclusive(folder, doing="running this sweep"):
        save_resumed_sweep(folder, request)
        _run(sweep, folder, train, resume)


def _run(sweep: Sweep, folder: Path, train: Train, resume: Resume) -> None:
    outcomes = Outcomes(folder)
    source: Source
    if sweep.is_search:
        from dpo_cli.cli.sweep.search import Search

        source = Search(sweep.overrides, sweep.settings, folder, seed=sweep.seed)
    else:
        source = Grid(sweep.grid(), outcomes)
    if sweep.settings.cluster is None:
        _run_here(sweep, source, outcomes, folder, train, resume)
    else:
        _run_on_cluster(sweep, source, outcomes, folder)
    _tell(sweep, source, outcomes, folder)


def _run_here(sweep: Sweep, source: Source, outcomes: Outcomes, folder: Path, train: Train, resume: Resume) -> None:
    """One job after the other. In a grid the first that fails ends the sweep."""
    total = sweep.settings.trials or len(source.started())
    while jobs := source.next(1):
        (job,) = jobs
        print(f"\n#{job.number} of {total}: {mask(' '.join(job.words))}", flush=True)
        try:
            if (folder / str(job.number) / REQUEST_FILE).exists():
                resume(folder / str(job.number))
            else:
                train(_created(sweep, job, folder))
            code = 0
        except (DpoError, KeyboardInterrupt) as error:
            code = error.exit_code if isinstance(error, DpoError) else EXIT_KEYBOARD
            if code not in (_JUDGED if sweep.is_search else SUCCEEDED):
                print(f"The sweep stops at job {job.number}, before {total - job.number - 1} more.", file=sys.stderr)
                print(f"Go on with this job: dpo-train resume={folder / str(job.number)}", file=sys.stderr)
                print(f"Go on with the sweep: dpo-train resume={folder}", file=sys.stderr)
                raise
            print(error, file=sys.stderr)
        outcomes.record(job, code)
        source.tell(job, code)
        _compared(sweep, source, outcomes, folder)


def _run_on_cluster(sweep: Sweep, source: Source, outcomes: Outcomes, folder: Path) -> None:
    """Jobs side by side; none ends another. Raises DpoError at the end when some are to be run again."""
    from dpo_cli.cli.sweep.cluster import Cluster

    cluster = Cluster(sweep.settings, folder)
    at_once = sweep.settings.parallel or source.at_once
    try:
        while True:
            jobs = source.next(at_once - len(cluster.names))
            for job in jobs:
                if not (folder / str(job.number) / REQUEST_FILE).exists():
                    _created(sweep, job, folder)
            if jobs:
                cluster.start(jobs)
            if not cluster.names:
                break
            for job, code in cluster.ended():
                outcomes.record(job, code)
                source.tell(job, code)
                print(f"#{job.number}: {outcomes.state(job.number)}", flush=True)
                _compared(sweep, source, outcomes, folder)
    except BaseException:
        if cluster.names:
            print(f"Jobs go on without the sweep: {', '.join(cluster.names)}", file=sys.stderr)
            print(f"Wait for them again: dpo-train resume={folder}", file=sys.stderr)
        raise
    expected = _JUDGED if sweep.is_search else SUCCEEDED
    failed = [job for job in source.started() if outcomes.codes.get(job.number) not in expected]
    if failed:
        _tell(sweep, source, outcomes, folder)
        raise DpoError(
            f"{len(failed)} jobs have failed: {', '.join(str(job.number) for job in failed)}.",
            where=str(folder / "cluster"),
            hint=f"dpo-train resume={folder}, which goes on with these",
        )


def _created(sweep: Sweep, job: Job, folder: Path) -> Config:
    request = replace(sweep.request, overrides=job.words)
    config = check(_in_folder(compose(request), folder / str(job.number)))
    create_run_folder(config, request)
    return config


def _tell(sweep: Sweep, source: Source, outcomes: Outcomes, folder: Path) -> None:
    """The table, and the page with all curves."""
    show(_compared(sweep, source, outcomes, folder), folder, sweep.settings)
    jobs = [folder / str(job.number) for job in source.started()]
    measured = [job for job in jobs if (job / "metrics.jsonl").exists()]
    if not (sweep.settings.report and measured):
        return
    try:
        print(f"report: {write_report(measured, folder / 'report')}")
    except Exception as error:  # the sweep itself is done, and its table written
        print(f"There is no report: {error}\n  try:   dpo-report {folder}", file=sys.stderr)


def _compared(sweep: Sweep, source: Source, outcomes: Outcomes, folder: Path) -> list[Row]:
    return compare(source.started(), outcomes, folder, sweep.settings)


def _checked(request: Request, jobs: Sequence[list[str]]) -> Path:
    """The sweep's folder, once all jobs are known to be right."""
    problems: list[DpoError] = []
    plans = False
    parent: Path | None = None
    for number, job in enumerate(jobs):
        composition = compose(replace(request, overrides=tuple(job)))
        # The first job decides, so that ${now:} is asked once for all of them.
        parent = parent or _parent_folder(composition)
        try:
            plans |= check(_in_folder(composition, parent / str(number))).plan
        except ConfigError as error:
            problems += error.problems
    if plans:
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
    return parent


def _in_folder(composition: Composition, folder: Path) -> Composition:
    return replace(composition, values={**composition.values, "run_dir": str(folder)})


def _parent_folder(composition: Composition) -> Path:
    named = str(composition.values.get("run_dir", ""))
    return Path(unused_name(f"{named}_sweep") if is_shipped(composition.place("run_dir") or "") else named)


def _problems_of(composition: Composition) -> list[DpoError]:
    try:
        check_by(SWEEPING, composition)
    except ConfigError as error:
        return list(error.problems)
    return []


def _distinct(problems: Sequence[DpoError]) -> list[DpoError]:
    return list({str(problem): problem for problem in problems}.values())
