"""The exceptions that Lockstep raises on purpose, and how others', and settings, are put in words.

The command line maps them to exit codes.
"""

from __future__ import annotations

import os


class LockstepError(Exception):
    """Root of all errors that Lockstep raises; the message says what to do."""


class BadRequestError(LockstepError):
    """The request cannot be served as it stands; nothing was started. Exit code 2."""


class JobFailedError(LockstepError):
    """A job that was started could not be finished. Exit code 3."""


class NotFiniteError(JobFailedError):
    """A step produced NaN or infinity. It would do so again, so the job is not retried."""


class RankFailedError(JobFailedError):
    """A rank died, stalled, raised or disagreed, so its whole group ends.

    Attributes:
        rank: the rank; None if no single rank can be named.
        where: what it was doing, such as `step 7`.
        reason: why it failed, as far as is known.
        told: whether that rank itself explains the failure to the user.
        host: name of its machine; empty if all ranks are on one, or if it is unknown.
    """

    def __init__(self, rank: int | None, where: str, reason: str, told: bool = False, host: str = ""):
        self.rank, self.where, self.reason, self.told, self.host = rank, where, reason, told, host
        named = "the rank group" if rank is None else f"rank {rank}{host and f' on {host}'}"
        super().__init__(f"{named} failed at {where}: {reason}")

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[int | None, str, str, bool, str]]:
        """Pickle the constructor's arguments, as errors travel between processes."""
        return type(self), (self.rank, self.where, self.reason, self.told, self.host)


class CancelledError(LockstepError):
    """The job was cancelled, at the same step on every rank. Exit code 130."""


def setting(name: str, value: object = True) -> str:
    """Name a setting as the command line and Python write it, such as `--resume (in Python: resume=True)`."""
    option = f"--{name.replace('_', '-')}"
    return f"{option if value is True else f'{option} {value}'} (in Python: {name}={value})"


def reason(error: BaseException) -> str:
    """Message of an error, on one line: without the number and files of a system error, and without further
    lines; the name of its class if it has no message."""
    said = (isinstance(error, OSError) and error.strerror) or str(error)
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)


def named(error: BaseException) -> str:
    """Describe an unexpected error on one line: the name of its class, and its message."""
    name, said = type(error).__name__, reason(error)
    return name if said == name else f"{name}: {said}"


def in_words(error: BaseException) -> str:
    """Describe an error to a user: Lockstep's own by its message, any other as `named`."""
    return str(error) if isinstance(error, LockstepError) else named(error)


def with_files(error: OSError) -> str:
    """Message of a system error, preceded by the files that it names."""
    names = (os.fsdecode(name) for name in (error.filename2, error.filename) if isinstance(name, str | bytes))
    return ": ".join([*(repr(name) for name in dict.fromkeys(names)), reason(error)])
