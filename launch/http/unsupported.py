"""Routes of OpenAI's contract that are always refused, with the reason."""

from __future__ import annotations

from typing import NoReturn

from fastapi import APIRouter

from launch.http.auth import Caller
from launch.http.errors import ApiError

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("/edits", response_model=None)
async def edit(key: Caller) -> NoReturn:
    """Always refused: no model here edits an existing video."""
    said = "no model here edits a video; remix makes one again with another prompt and the same seed"
    raise ApiError(422, "unsupported", said)
