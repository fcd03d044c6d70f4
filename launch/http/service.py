"""The service behind the routes: the queue, and what the API adds to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from launch.http.assets import Store
from launch.http.auth import Keys
from launch.http.catalog import Catalog
from launch.http.errors import ApiError
from launch.http.jobs import JobMaker
from launch.http.records import Records
from launch.serve.queue import Queue

_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a server.

    Attributes:
        queued: requests that may wait or run at a time, of all owners.
        keep: seconds for which videos are kept after their end.
        free: bytes that must be free on the disk for a request to be accepted.
    """

    queued: int = 1000
    keep: float = 7 * _DAY
    free: int = 2**30


@dataclass(frozen=True, slots=True)
class Service:
    """Service behind the routes, independent of HTTP.

    Attributes:
        pool: returns the reason why no replica can begin with a request now; empty if one can.
    """

    queue: Queue
    keys: Keys
    catalog: Catalog
    bounds: Bounds
    records: Records
    store: Store
    jobs: JobMaker
    pool: Callable[[], str] = field(default=lambda: "")

    @classmethod
    def on(
        cls,
        queue: Queue,
        catalog: Catalog,
        keys: Keys,
        bounds: Bounds = Bounds(),
        pool: Callable[[], str] = lambda: "",
    ) -> Service:
        """Make the service of a queue."""
        return cls(
            queue=queue,
            keys=keys,
            catalog=catalog,
            bounds=bounds,
            records=Records(queue, bounds.queued),
            store=Store(queue.folder, bounds.free),
            jobs=JobMaker(catalog, queue.folder / "presets"),
            pool=pool,
        )

    def check_priority(self, wanted: int, most: int) -> None:
        """Refuse a priority that a key does not allow.

        Raises:
            ApiError: it is too high.
        """
        if wanted > most:
            said = f"priority: {wanted} given; your key allows at most {most}"
            raise ApiError(403, "priority_not_allowed", said, param="priority")


def service_of(request: Request) -> Service:
    """The service of the app that answers a request."""
    found = request.app.state.service
    assert isinstance(found, Service)
    return found


async def _service(request: Request) -> Service:
    return service_of(request)


TheService = Annotated[Service, Depends(_service)]
