"""Metrics for Prometheus at `/metrics`: requests by route, and the state of the queue."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http import HTTPMethod
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.http.auth import Caller
from launch.http.service import Service

router = APIRouter(tags=["health"])

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


class ApiMetrics:
    """Metrics of one server."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lockstep_http_requests",
            "Answered requests.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "lockstep_http_seconds",
            "Seconds until an answer begins.",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_Queue(service))


class _Queue(Collector):
    """The queue, read when it is asked for."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        states = GaugeMetricFamily("lockstep_queue_requests", "Requests of the queue.", labels=["state"])
        for state, count in self._service.queue.count().items():
            states.add_metric([state], count)
        yield states
        replicas = GaugeMetricFamily("lockstep_replicas", "Replicas of the pool.", labels=["state"])
        found = [replica.state for replica in self._service.queue.replicas()]
        for one in sorted({*found}):
            replicas.add_metric([one], found.count(one))
        yield replicas
        free = GaugeMetricFamily("lockstep_disk_free_bytes", "Free bytes where videos are written.")
        free.add_metric([], self._service.store.room())
        yield free

    def describe(self) -> list[Any]:
        """Nothing: names are known without asking the queue."""
        return []


class Measured:
    """Middleware that counts and times requests by the route's pattern, as ids would make endless labels."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, answered = time.perf_counter(), False

        def count(status: int) -> None:
            nonlocal answered
            answered = True
            self._count(scope, status, time.perf_counter() - started)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not answered:  # the answer is made outside of all middleware
                count(500)
            raise

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request; clients may invent paths and methods, and these would make endless labels, too."""
        route = getattr(scope.get("route"), "path", "none")
        known = route != "none" and scope["method"] in HTTPMethod.__members__
        method = scope["method"] if known else "any"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.seconds.labels(method, route).observe(seconds)


@router.get("/metrics", response_class=Response)
def metrics(request: Request, key: Caller) -> Response:
    """Get metrics in the text format of Prometheus."""
    found: ApiMetrics = request.app.state.metrics
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)
