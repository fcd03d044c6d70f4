"""The exceptions that Lockstep raises on purpose. The command line maps them to exit codes."""

from __future__ import annotations


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
    """

    def __init__(self, rank: int | None, where: str, reason: str, told: bool = False):
        self.rank, self.where, self.reason, self.told = rank, where, reason, told
        named = "the rank group" if rank is None else f"rank {rank}"
        super().__init__(f"{named} failed at {where}: {reason}")

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[int | None, str, str, bool]]:
        """Pickle the constructor's arguments, as errors travel between processes."""
        return type(self), (self.rank, self.where, self.reason, self.told)


class CancelledError(LockstepError):
    """The job was cancelled, at the same step on every rank. Exit code 130."""
