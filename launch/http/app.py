"""The HTTP API as an ASGI app, on a queue that a pool of replicas serves."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from launch.http import (
    comparing,
    content,
    estimates,
    events,
    extensions,
    films,
    health,
    joining,
    metrics,
    models,
    page,
    reference,
    retention,
    unsupported,
    videos,
    webhooks,
)
from launch.http.bodies import MOST_BYTES
from launch.http.errors import tell_errors
from launch.http.film import FilmCreate
from launch.http.heads import Heads
from launch.http.hub import Hub
from launch.http.lanes import Lanes
from launch.http.limits import BodyLimit, OwnPagesOnly
from launch.http.openapi import describe
from launch.http.rounds import Rounds
from launch.http.service import Service
from launch.http.video import Extension, ExtensionOf, Remix, VideoCreate
from runtime.versions import versions

_TOGETHER = 16 * MOST_BYTES  # of bodies in memory
_ENDING = 5.0  # seconds for background tasks to finish what they are at
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@asynccontextmanager
async def _background(app: FastAPI) -> AsyncIterator[None]:
    """Run the server's background tasks."""
    service = app.state.service
    sweep, hooks, join = (
        retention.Sweeper(service).sweep,
        webhooks.Webhooks(service),
        joining.Joiner(service).join,
    )
    tasks = (
        Rounds("sweeper", retention.EVERY, sweep, "videos that expired are kept longer"),
        Rounds("webhooks", webhooks.EVERY, hooks.send, "webhooks are delayed"),
        Rounds("joiner", joining.EVERY, join, "films are joined later"),
    )
    for task in tasks:
        task.start()
    yield
    deadline = time.monotonic() + _ENDING
    hooks.stop()
    for task in tasks:
        task.stop()
    for task in tasks:
        task.wait(deadline - time.monotonic())


def make_app(service: Service, hosts: Sequence[str] | None = None) -> FastAPI:
    """Make the ASGI app of the API.

    Args:
        service: service behind the routes.
        hosts: host names of this machine, which requests must use, and come from it; by default those of the
            loopback, unless keys protect the server.

    Example:
        >>> import uvicorn
        >>> from pathlib import Path
        >>> from launch.http.auth import Keys
        >>> from launch.http.catalog import Catalog
        >>> from launch.serve.queue import Queue
        >>> service = Service.on(Queue(Path("queue")), Catalog.of(["wan-tiny"]), Keys(None))
        >>> uvicorn.run(make_app(service))  # doctest: +SKIP
    """
    app = FastAPI(
        title="Lockstep",
        version=versions()["lockstep"],
        description="Makes videos. Follows the contract of OpenAI's `/v1/videos`.",
        docs_url=None,
        redoc_url=None,
        lifespan=_background,
    )
    app.state.service = service
    app.state.lanes = Lanes()
    app.state.hub = Hub(service.queue.last_event)
    app.state.metrics = metrics.ApiMetrics(service)
    app.state.page = page.Cached(lambda: reference.page_of(app.openapi()))
    app.include_router(videos.router)
    app.include_router(content.router)
    app.include_router(unsupported.router)
    app.include_router(extensions.router)
    app.include_router(events.router)
    app.include_router(films.router)
    app.include_router(estimates.router)
    app.include_router(comparing.router)
    app.include_router(models.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(page.router)
    app.include_router(reference.router)
    tell_errors(app)
    describe(app, [VideoCreate, Remix, Extension, ExtensionOf, FilmCreate])
    app.add_middleware(BodyLimit, most=MOST_BYTES, together=_TOGETHER)
    known = LOCAL_HOSTS if hosts is None and service.keys.open else hosts
    app.add_middleware(OwnPagesOnly, hosts=known)
    app.add_middleware(metrics.Measured, metrics=app.state.metrics)
    app.add_middleware(Heads)
    return app
