"""Lets SIGINT, SIGTERM and SIGHUP stop what is running."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from launch.shell.exits import interrupt
from runtime.engine import Engine
from runtime.parallel.signals import SignalCount, ending_signals
from runtime.sampling.commands import Command

log = logging.getLogger("launch")


def stop_on_signals(engine: Engine) -> None:
    """Let a signal stop `engine` after a step, the same on all ranks, with a checkpoint; a video that has had
    its last step is finished. A second signal, or one while nothing runs, stops at once."""
    _listen(lambda: engine.command(Command.STOP))


@contextmanager
def stopped_by_signals(stop: Callable[[], bool]) -> Iterator[None]:
    """Let the first signal call `stop`. A second one raises KeyboardInterrupt; so does the first if `stop`
    returns False, as there is nothing to stop."""
    before = {number: signal.getsignal(number) for number in ending_signals()}
    _listen(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(stop: Callable[[], bool]) -> None:
    asked = SignalCount()

    def handle(number: int, frame: FrameType | None) -> None:
        if not asked.count and not stop():
            interrupt(number, frame)
            return
        if not asked.hear():
            return
        if asked.count > 1:
            interrupt(number, frame)
            return
        log.warning(
            "stopping after this step; a video whose steps are all finished is still written; "
            "a second signal stops immediately"
        )

    for number in ending_signals():
        signal.signal(number, handle)


def ignore_signals() -> None:
    """Make ending signals do nothing in this process from now on; child programs still react to them."""
    for number in ending_signals():
        signal.signal(number, lambda number, frame: None)
