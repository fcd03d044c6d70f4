"""The API on Ray Serve: `serve run launch.http.deployment:app queue=/shared/queue keys=/shared/keys.yaml`.

The replica of the deployment answers requests and keeps the pool of rank groups at work, on the same cluster.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve

from runtime.errors import BadRequestError
from runtime.files.problems import explain

if TYPE_CHECKING:
    from launch.http.service import Service

_DAY = 86400.0
_MOST_AT_A_TIME = 512  # requests that are answered at a time, streams of events included


class Settings(BaseModel):
    """Arguments of the deployment, as `serve run` and a Serve config file give them.

    Attributes:
        queue: absolute path of the queue's folder, on a disk that its nodes share.
        config: names or paths of configs, with commas between them; the first is the default. Without any and
            without models, wan-tiny.
        model: folders or repositories of models that are offered, too, with the settings that are usual for
            each; with commas between them.
        keys: file of keys; without one the API answers to names of this machine only.
        replicas: videos made at the same time; 0 leaves the queue to `lockstep queue run --keep`.
        ranks: processes that make a video together.
        days: days for which a video is kept after its end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue: Path
    config: str = ""
    model: str = ""
    keys: Path | None = None
    replicas: int = Field(default=1, ge=0, le=4096)
    ranks: int = Field(default=1, ge=1, le=65536)
    days: float = Field(default=7.0, gt=0, le=3650)

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Settings:
        """Read the arguments of `serve run`.

        Raises:
            BadRequestError: one of them is unknown, missing or out of bounds.
        """
        try:
            settings = cls.model_validate(dict(given))
        except ValidationError as error:
            raise BadRequestError(explain(error, model=cls)) from None
        if not settings.queue.is_absolute():
            raise BadRequestError(f"queue: {str(settings.queue)!r} given; an absolute path is needed")
        return settings


def app(given: dict[str, str]) -> serve.Application:
    """Make the Ray Serve application of the API.

    Args:
        given: see `Settings`.
    """
    settings = Settings.parse(given)
    deployment = serve.deployment(
        serve.ingress(lambda: _asgi(settings))(),
        name="lockstep",
        num_replicas=1,
        max_ongoing_requests=_MOST_AT_A_TIME,
    )
    return deployment.bind()


def _asgi(settings: Settings) -> FastAPI:
    """Make the ASGI app in the replica's process, and start its pool."""
    from launch.http.app import make_app
    from launch.http.auth import Keys
    from launch.http.catalog import Catalog
    from launch.http.pool import PoolKeeper
    from launch.http.service import Bounds, Service
    from launch.serve.queue import Queue

    queue = Queue(settings.queue)
    configs, models = (listed.split(",") if listed else [] for listed in (settings.config, settings.model))
    catalog = Catalog.of(configs, ranks=settings.ranks, models=models)
    pool = PoolKeeper(queue, settings.replicas, settings.ranks, _driver_environment())
    bounds = Bounds(keep=settings.days * _DAY)
    service: Service = Service.on(queue, catalog, Keys(settings.keys), bounds, pool.problem)
    pool.start()
    return make_app(service)


def _driver_environment() -> dict[str, str]:
    """Environment of a driver on this cluster: what Ray told this worker is not for it."""
    kept = {name: value for name, value in os.environ.items() if not _is_workers(name)}
    return kept | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def _is_workers(name: str) -> bool:
    """Whether a variable is of Ray, and not about who may use the cluster."""
    return name.startswith("RAY_") and not name.startswith("RAY_AUTH")
