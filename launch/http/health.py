"""Health checks: whether the server is alive, and whether it can begin with a request."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from launch.http.errors import ApiError, without_paths
from launch.http.service import TheService

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """Response of a healthy server."""

    status: Literal["ok"] = "ok"


@router.get("/healthz")
async def healthz() -> Health:
    """Answer 200 while the process is alive."""
    return Health()


@router.get("/readyz")
def readyz(service: TheService) -> Health:
    """Answer 200 if a request would be accepted and a replica could begin with it, else the reason."""
    problem = service.pool()
    if problem:
        raise ApiError(503, "not_ready", without_paths(problem), retry_after=2)
    service.store.check_room()
    return Health()
