"""Wakes the streams that wait for events: one poll of the queue's file serves all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from starlette.concurrency import run_in_threadpool

from launch.http.errors import ApiError
from launch.serve.queue import QueueError

_LOOK = 0.2  # seconds between two looks
_MOST, _OF_ONE = 256, 32  # streams, of all owners and of one


class Hub:
    """Lets coroutines wait for events that other processes write.

    Args:
        last: returns the number of the last event.
    """

    def __init__(self, last: Callable[[], int]):
        self._ask, self._last, self._over = last, 0, False
        self._changed, self._waiting = asyncio.Condition(), 0
        self._task: asyncio.Task[None] | None = None
        self._streams: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        """Whether the server is ending."""
        return self._over

    @contextmanager
    def stream(self, owner: str) -> Iterator[None]:
        """Count a stream of an owner while the block runs.

        Raises:
            ApiError: too many are open.
        """
        if self._streams.total() >= _MOST or self._streams[owner] >= _OF_ONE:
            raise ApiError(429, "too_many_streams", "too many streams of events are open", retry_after=10)
        self._streams[owner] += 1
        try:
            yield
        finally:
            self._streams[owner] -= 1

    async def wait(self, after: int, seconds: float) -> bool:
        """Wait until there is an event after `after` or the server ends; return False after `seconds`."""
        self._waiting += 1
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._look())
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self._over or self._last > after)
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """End all streams."""
        async with self._changed:
            self._over = True
            self._changed.notify_all()

    async def _look(self) -> None:
        while self._waiting and not self._over:
            with suppress(QueueError):  # locked; the next look makes up for it
                found = await run_in_threadpool(self._ask)
                if found != self._last:
                    async with self._changed:
                        self._last = found
                        self._changed.notify_all()
            await asyncio.sleep(_LOOK)
