"""Commands to a running job, and the mailbox that holds them."""

from __future__ import annotations

from collections import deque
from enum import IntEnum


class Command(IntEnum):
    """Command to a running generation; of several, the greatest counts."""

    NONE = 0
    FORCE_COMPUTE = 1
    STOP = 2
    CANCEL = 3


class Commands:
    """Mailbox of one job's commands on this rank, which any thread or signal handler may fill.

    `STOP` and `CANCEL` stay in it: every later step of the job sees them. `FORCE_COMPUTE` is for the next
    step. There is no lock, on which a signal handler could deadlock: each command is one assignment or one
    append, and only the coordinator takes commands out.
    """

    def __init__(self) -> None:
        self._stop = self._cancel = False
        self._forced: deque[Command] = deque()

    def give(self, command: Command) -> None:
        """Put `command` into the mailbox."""
        match command:
            case Command.CANCEL:
                self._cancel = True
            case Command.STOP:
                self._stop = True
            case Command.FORCE_COMPUTE:
                self._forced.append(command)

    def take(self) -> Command:
        """Take the greatest command, which is sent to all ranks with the next step."""
        forced = False
        while self._forced:
            forced = bool(self._forced.popleft())
        if self._cancel:
            return Command.CANCEL
        if self._stop:
            return Command.STOP
        return Command.FORCE_COMPUTE if forced else Command.NONE
