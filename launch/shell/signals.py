"""What SIGINT, SIGTERM and SIGHUP do to what is running."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from launch.shell.endings import ending_signals
from launch.shell.exits import interrupt
from runtime.engine import Engine
from runtime.sampling.commands import Command

log = logging.getLogger("launch")

_SAME = 1.0  # seconds: a terminal and an agent may both send one


def stop_on_signals(engine: Engine) -> None:
    """Let them stop what `engine` runs after a step, the same on all ranks, with a checkpoint; what has had
    its last step is finished. When nothing runs, and at the second one, it stops at once."""
    _listen(lambda: engine.command(Command.STOP))


@contextmanager
def stopped_by_signals(stop: Callable[[], bool]) -> Iterator[None]:
    """Let the first one call `stop`. The second one, and one that `stop` has no use for (it says so by
    returning False), raise KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in ending_signals()}
    _listen(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(stop: Callable[[], bool]) -> None:
    asked: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[0] < _SAME:
            return
        if asked or not stop():
            interrupt(number, frame)
            return
        asked.append(now)
        log.warning(
            "stopping after a step, or when a video that has had its last one is written; "
            "once more stops at once"
        )

    for number in ending_signals():
        signal.signal(number, handle)


def ignore_signals() -> None:
    """From now on they do nothing here; programs that are started later hear them."""
    for number in ending_signals():
        signal.signal(number, lambda number, frame: None)
