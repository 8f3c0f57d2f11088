"""The errors that lox-stream raises: each says what, found, expected and the way out."""

from __future__ import annotations

from collections.abc import Sequence


class LoxError(Exception):
    """Base of all errors of this library; its text is one message for a person."""


class OptionError(LoxError):
    """An option has a value that cannot be obeyed."""


class CheckpointError(LoxError):
    """A checkpoint cannot be read, or base and aligned do not fit each other.

    `problems` holds every problem found, each a complete message.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class OutputError(LoxError):
    """The output folder cannot be used or written: not empty, locked, full, not permitted."""


class InUseError(OutputError):
    """Another process writes to the folder."""


class ResumeError(OutputError):
    """The folder holds the state of a run with other inputs or options."""


class DataError(LoxError):
    """The weights themselves are unusable: NaN or Inf, a file that was cut while it was read."""


class MemoryBudgetError(LoxError):
    """A tensor needs more than the memory budget allows."""


class DeviceError(LoxError):
    """The device asked for is not usable."""


class JudgeError(LoxError):
    """The judge of a landscape's points failed, or said no number."""


class Cancelled(LoxError):
    """The work was stopped on request; the output folder can be resumed."""


def reworded(error: LoxError, text: str) -> LoxError:
    """An error of the same kind that says `text`, of which each line is a problem of a checkpoint."""
    return CheckpointError(text.split("\n")) if isinstance(error, CheckpointError) else type(error)(text)
