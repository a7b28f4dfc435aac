"""A search by Optuna: trials that learn from those before, kept in a study that outlives the process"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from dpo_cli.cli.sweep.jobs import SUCCEEDED, Job
from dpo_cli.config.schema import SweepConfig
from dpo_cli.errors import EXIT_BAD_INPUT, EXIT_NON_FINITE, ConfigError, DpoError
from dpo_cli.train.results import final_results

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_STUDY_FILE = "study.log"
# Where the first so many trials fail, it is not for the values that they were given.
_HOPELESS = 3


class Search:
    """Asks Optuna for values and tells it what came of them.

    A trial that was not finite or ran out of memory has failed, which Optuna leaves out; one that health.stop_on has
    ended counts as pruned, which is worse than any that was finished.
    """

    def __init__(self, overrides: Sequence[Override], settings: SweepConfig, folder: Path, *, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.at_once = 1
        self._overrides = overrides
        self._folder = folder
        self._metric = settings.metric
        self._trials = settings.trials or 0
        self._distributions = {key_of(item): distribution(item) for item in overrides if item.is_sweep_override()}
        storage: Any = settings.storage or optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(folder / _STUDY_FILE))
        )
        self._study = optuna.create_study(
            study_name=str(folder.absolute()) if settings.storage else "sweep",
            storage=storage,
            direction=settings.direction,
            load_if_exists=True,
        )
        for trial in self._study.get_trials(deepcopy=False):
            # A process that was killed while it asked has left a trial without some of its values.
            if not trial.state.is_finished() and not self._is_whole(trial):
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        known = self._study.get_trials(deepcopy=False)
        # A sampler that began with the same seed again would draw the same values again.
        drawn = seed + len(known)
        self._study.sampler = (
            optuna.samplers.RandomSampler(seed=drawn)
            if settings.sampler == "random"
            else optuna.samplers.TPESampler(seed=drawn, constant_liar=True)
        )
        # What an earlier process has begun.
        self._begun = [self._job(trial) for trial in known if not trial.state.is_finished()]

    def next(self, count: int) -> Sequence[Job]:
        taken, self._begun = self._begun[:count], self._begun[count:]
        while len(taken) < count and len(self._study.get_trials(deepcopy=False)) < self._trials:
            asked = self._study.ask(self._distributions)
            taken.append(self._job(self._study.get_trials(deepcopy=False)[asked.number]))
        return taken

    def tell(self, job: Job, code: int) -> None:
        from optuna.trial import TrialState

        if code == 0:
            self._study.tell(job.number, self._value(job))
        elif code in SUCCEEDED:
            self._study.tell(job.number, state=TrialState.PRUNED)
        elif code in (EXIT_BAD_INPUT, EXIT_NON_FINITE):
            self._study.tell(job.number, state=TrialState.FAIL)
            known = filter(self._is_whole, self._study.get_trials(deepcopy=False))
            ended = [trial.state for trial in known if trial.state.is_finished()]
            if len(ended) >= _HOPELESS and set(ended) == {TrialState.FAIL}:
                raise DpoError(f"The first {len(ended)} trials have failed.", where=str(self._folder / str(job.number)))

    def started(self) -> Sequence[Job]:
        return [self._job(trial) for trial in filter(self._is_whole, self._study.get_trials(deepcopy=False))]

    def _is_whole(self, trial: FrozenTrial) -> bool:
        return self._distributions.keys() <= trial.params.keys()

    def _value(self, job: Job) -> float:
        results = final_results(self._folder / str(job.number))
        if self._metric not in results:
            known = ", ".join(name for name in results if not name.startswith(("train/perf", "eval/perf")))
            raise ConfigError(
                f"Job {job.number} has no {self._metric} to search by.",
                where="sweep.metric",
                hint=f"one of {known}; then dpo-train resume={self._folder} sweep.metric=NAME",
            )
        return results[self._metric]

    def _job(self, trial: FrozenTrial) -> Job:
        values = tuple((key, str(trial.params[key])) for key in self._distributions)
        return Job(trial.number, words_of(self._overrides, dict(values)), values)


def words_of(overrides: Sequence[Override], drawn: Mapping[str, str]) -> tuple[str, ...]:
    """The command line of one job. drawn: its value of every key that is swept."""
    return tuple(
        f"{key_of(item)}={drawn[key_of(item)]}" if item.is_sweep_override() else str(item.input_line)
        for item in overrides
    )


def key_of(override: Override) -> str:
    return str(override.get_key_element())


def ends(override: Override) -> list[str]:
    """Values of a key that show whether all are allowed: those of a list, the ends of a range."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    listed = [str(item) for item in override.sweep_string_iterator()]
    return [listed[0], listed[-1]] if isinstance(value, RangeSweep) else listed


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws a key's values from. Raises ConfigError where a range is empty or has no logarithm."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            logarithmic = "log" in value.tags
            if isinstance(value.start, int) and isinstance(value.end, int):
                return IntDistribution(value.start, value.end, log=logarithmic)
            return FloatDistribution(float(value.start or 0), float(value.end or 0), log=logarithmic)
        if isinstance(value, RangeSweep):
            listed = list(value.range())
            if all(isinstance(number, int) for number in listed):
                return IntDistribution(int(listed[0]), int(listed[-1]), step=int(value.step))
            return FloatDistribution(float(listed[0]), float(listed[-1]), step=float(value.step))
        assert isinstance(value, ChoiceSweep)
        return CategoricalDistribution(tuple(map(str, override.sweep_string_iterator())))
    except ValueError as error:
        raise ConfigError(f"{override.input_line} cannot be searched: {error}", where="command line") from None
