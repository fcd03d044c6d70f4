"""Lanes for work that takes seconds: it waits for its like, and quick requests never wait for it.

Some forty threads answer requests. As many images that are decoded, or videos that are measured, would leave
none for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Request

_Made = TypeVar("_Made")
_IMAGE = "input_reference"


class Lanes:
    """How much of each kind of slow work is done at a time; what waits holds no thread.

    Attributes:
        decoding: requests with images, each of which is decoded in a process of its own.
        drawing: thumbnails and contact sheets.
        measuring: comparisons, which take all that a core can give.
    """

    def __init__(self) -> None:
        self.decoding, self.drawing, self.measuring = (CapacityLimiter(count) for count in (2, 2, 1))

    def of(self, fields: Mapping[str, Any]) -> CapacityLimiter | None:
        """The lane for a request with these fields; None for a quick one."""
        shots = fields.get("shots")
        parts = [fields, *(shots if isinstance(shots, list) else ())]
        images = any(isinstance(part, Mapping) and _IMAGE in part for part in parts)
        return self.decoding if images else None


async def in_lane(lane: CapacityLimiter | None, work: Callable[..., _Made], *given: Any) -> _Made:
    """Do work in a thread, in a lane or among the quick requests."""
    return await to_thread.run_sync(work, *given, limiter=lane)


async def _lanes(request: Request) -> Lanes:
    found = request.app.state.lanes
    assert isinstance(found, Lanes)
    return found


TheLanes = Annotated[Lanes, Depends(_lanes)]
