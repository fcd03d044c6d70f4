"""Routes for whoever watches the server: is it alive, and can it begin with a request?"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from launch.http.errors import ApiError
from launch.http.service import TheService

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """All is well."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz")
def readyz(service: TheService) -> Health:
    """A request would be accepted, and a replica could begin with it; 503 with the reason if not."""
    problem = service.pool()
    if problem:
        raise ApiError(503, "not_ready", problem, retry_after=2)
    service.check_room()
    return Health()
