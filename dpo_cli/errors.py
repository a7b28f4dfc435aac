"""Every failure that is not our bug: what is wrong, where, and how to mend it.

The command line prints these without a traceback and exits with `exit_code`.
Anything else that escapes is a bug of this tool and shows its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

EXIT_FOUND = 1
EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
# Not that of a signal: resuming a run that ended itself is a decision, not something to try again later.
EXIT_ENDED_EARLY = 4
# sysexits' EX_TEMPFAIL: "try again later", which is what resuming does.
EXIT_INTERRUPTED = 75


class DpoError(Exception):
    """A problem that the user can mend.

    message: what is wrong, one plain sentence.
    where: the file, row, key or folder it was found in.
    hint: what to type or change.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  try:   {self.hint}")
        return "\n".join(lines)


class ConfigError(DpoError):
    """The configuration cannot be run as it stands; holds every problem found, not the first."""

    def __init__(self, problems: Sequence[DpoError] | str, *, where: str | None = None, hint: str | None = None):
        if isinstance(problems, str):
            super().__init__(problems, where=where, hint=hint)
            self.problems: tuple[DpoError, ...] = (self,)
        else:
            super().__init__("\n".join(str(problem) for problem in problems))
            self.problems = tuple(problems)


class DataError(DpoError):
    """A data file, row or template is unusable."""


class DataProblems(DpoError):
    """The data can be trained on and have what they were not to have."""

    exit_code = EXIT_FOUND


class ModelError(DpoError):
    """A model or tokenizer is missing, damaged, or one that would give wrong numbers here."""


class LossInputError(DpoError):
    """A loss was handed something it cannot be computed from."""


class StoreError(DpoError):
    """The reference store is damaged or disagrees with the model."""


class CheckpointError(DpoError):
    """A run folder or checkpoint cannot be written, read, or resumed as asked."""


class OutOfMemory(DpoError):
    """The device's memory does not hold what was asked of it."""


class NonFiniteError(DpoError):
    """A loss or gradient became NaN or infinite; the weights were not moved."""

    exit_code = EXIT_NON_FINITE


class EndedEarly(DpoError):
    """The run ended itself before its last step, as health.stop_on asks; checkpoint and final model are written."""

    exit_code = EXIT_ENDED_EARLY


class Interrupted(DpoError):
    """The run was asked to stop by a signal and saved a checkpoint first."""

    exit_code = EXIT_INTERRUPTED


class RankFailed(DpoError):
    """A process of a distributed run failed, with the exit code that its error has in a single process."""

    def __init__(self, message: str, *, exit_code: int = 1, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)
        self.exit_code = exit_code


def as_mendable(error: OSError) -> DpoError | None:
    """A full or forbidden disk is the user's to mend; None for what is our bug."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
        return DpoError(f"{error.strerror}.", where=error.filename)
    return None
