"""Routes of OpenAI's contract that are always refused, with the reason."""

from __future__ import annotations

from typing import Annotated, NoReturn

from fastapi import APIRouter, Path

from launch.http.auth import Caller
from launch.http.errors import ApiError, not_found

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("/edits", response_model=None)
async def edit(key: Caller) -> NoReturn:
    """Always refused: no model here edits an existing video."""
    said = "no model here edits a video; remix makes one again with another prompt and the same seed"
    raise ApiError(422, "unsupported", said)


@router.post("/characters", response_model=None)
async def create_character(key: Caller) -> NoReturn:
    """Always refused: no model here keeps characters."""
    said = "no model here keeps characters; input_reference gives an image that a video starts from"
    raise ApiError(422, "unsupported", said)


@router.get("/characters/{character_id}", response_model=None)
async def get_character(character_id: Annotated[str, Path(max_length=200)], key: Caller) -> NoReturn:
    """Always refused: there are no characters."""
    raise not_found("character", character_id)
