"""Commands: what is asked of a running job from outside, and the box that they lie in."""

from __future__ import annotations

from collections import deque
from enum import IntEnum


class Command(IntEnum):
    """What can be asked of a running generation; of several, the greatest counts."""

    NONE = 0
    FORCE_COMPUTE = 1
    STOP = 2
    CANCEL = 3


class Commands:
    """What has been asked of one job on this rank; given from any thread or signal handler.

    `STOP` and `CANCEL` stay: whoever coordinates a step of the job, now or later, sees them. `FORCE_COMPUTE`
    is for the next step. There is no lock, which a signal handler could wait for in vain: each command is one
    assignment or one append, and only the coordinator takes anything out.
    """

    def __init__(self) -> None:
        self._stop = self._cancel = False
        self._forced: deque[Command] = deque()

    def give(self, command: Command) -> None:
        """Ask for `command`."""
        match command:
            case Command.CANCEL:
                self._cancel = True
            case Command.STOP:
                self._stop = True
            case Command.FORCE_COMPUTE:
                self._forced.append(command)

    def take(self) -> Command:
        """The greatest command, to be told to all ranks with the next step."""
        forced = False
        while self._forced:
            forced = bool(self._forced.popleft())
        if self._cancel:
            return Command.CANCEL
        if self._stop:
            return Command.STOP
        return Command.FORCE_COMPUTE if forced else Command.NONE
