"""The exceptions that Lockstep raises on purpose. The command line maps them to exit codes."""

from __future__ import annotations


class LockstepError(Exception):
    """Root of all errors that Lockstep raises; the message says what to do."""


class BadRequestError(LockstepError):
    """The request cannot be served as it stands; nothing was started. Exit code 2."""


class JobFailedError(LockstepError):
    """A generation that was started could not be finished. Exit code 3."""
