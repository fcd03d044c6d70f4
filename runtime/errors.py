"""The exceptions that Lockstep raises on purpose. The command line maps them to exit codes."""

from __future__ import annotations


class LockstepError(Exception):
    """Root of all errors that Lockstep raises; the message says what to do."""


class BadRequestError(LockstepError):
    """The request cannot be served as it stands; nothing was started. Exit code 2."""


class JobFailedError(LockstepError):
    """A generation that was started could not be finished. Exit code 3."""


class NotFiniteError(JobFailedError):
    """A step gave numbers that are not finite. It would again, so the same job is not to be tried again."""


class RankFailedError(JobFailedError):
    """One rank died, stalled, raised or disagreed, so its whole group ends.

    Attributes:
        rank: which one; None if no single rank can be named.
        where: what it was doing, such as `step 7`.
        reason: what is known about it.
        told: that rank itself explains it to the user.
    """

    def __init__(self, rank: int | None, where: str, reason: str, told: bool = False):
        self.rank, self.where, self.reason, self.told = rank, where, reason, told
        named = "the rank group" if rank is None else f"rank {rank}"
        super().__init__(f"{named} failed at {where}: {reason}")

    def __reduce__(self) -> tuple[type[RankFailedError], tuple[int | None, str, str, bool]]:
        """Pickle by what it was made of: errors travel between processes."""
        return type(self), (self.rank, self.where, self.reason, self.told)


class CancelledError(LockstepError):
    """The generation was ended on request, at the same step on every rank. Exit code 130."""
