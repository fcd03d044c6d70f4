"""Makes the objects of videos that clients see from their records."""

from __future__ import annotations

import math
from typing import Any

from launch.http.errors import without_paths
from launch.http.event_records import Event
from launch.http.records import Record
from launch.http.video import RunDetails, Status, Video, VideoError
from launch.serve.entries import EXPIRED, State

_STATUS: dict[State, Status] = {
    State.WAITING: "queued",
    State.RUNNING: "in_progress",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "failed",  # clients know no other end
}
_SOONEST, _LATEST = 200, 10_000  # milliseconds between two polls
_WAITING = 1000  # likewise, per request that is before


def to_video(record: Record, keep: float) -> Video:
    """Make the object that a client sees of a video.

    Args:
        keep: seconds for which a video is kept after its end.
    """
    entry, details = record.entry, record.details
    done = entry.progress
    return Video(
        id=record.id,
        model=record.asked.model or "",
        status=_STATUS[entry.state],
        progress=_progress(record),
        created_at=int(record.created),
        started_at=None if entry.started is None else int(entry.started),
        completed_at=int(entry.ended) if entry.ended is not None and entry.state is State.DONE else None,
        expires_at=None if entry.ended is None else math.ceil(entry.ended + keep),
        seconds=f"{details.frames / details.fps:.6g}",
        size=record.size,
        prompt=record.asked.prompt,
        remixed_from_video_id=record.remixed,
        film_id=record.film,
        error=to_error(entry.state, entry.reason),
        request=details,
        run=RunDetails(
            position=record.ahead,
            step=done.step,
            steps=done.steps,
            nfe=done.nfe,
            seconds_left=done.seconds_left if entry.state is State.RUNNING else None,
            tries=entry.tries,
            cancelling=entry.unwanted and not record.ended,
            preview=bool(done.preview) and entry.state is State.RUNNING,
        ),
    )


def _progress(record: Record) -> int:
    """Finished steps in per cent; 100 only when the video is there."""
    done = record.entry.progress
    if record.entry.state is State.DONE:
        return 100
    return min(99, 100 * done.step // done.steps) if done.steps else 0


def to_error(state: State, reason: str) -> VideoError | None:
    """Make the error of a request that ended without a video; None for others."""
    if state is State.CANCELLED:
        code = "expired" if reason.startswith(EXPIRED) else "cancelled"
    elif state is State.FAILED:
        code = "generation_failed"
    else:
        return None
    return VideoError(code=code, message=without_paths(reason))


def to_event(event: Event) -> dict[str, Any]:
    """Make the data of an event that a client sees."""
    told: dict[str, Any] = {"video_id": event.video, "at": event.at}
    if event.kind != "state":
        return told | event.told
    state = State(event.told["state"])
    error = to_error(state, event.told["reason"])
    return told | {"status": _STATUS[state], "error": None if error is None else error.model_dump()}


def poll_after_ms(record: Record) -> int | None:
    """Milliseconds after which a client should poll again; None if nothing will change."""
    done = record.entry.progress
    match record.entry.state:
        case State.WAITING:
            wanted = _WAITING * (1 + (record.ahead or 0))
        case State.RUNNING if done.seconds_left is not None and done.steps > done.step:
            wanted = math.ceil(1000 * done.seconds_left / (done.steps - done.step))
        case State.RUNNING:  # it loads, or decodes
            wanted = _WAITING // 2
        case _:
            return None
    return min(max(wanted, _SOONEST), _LATEST)
