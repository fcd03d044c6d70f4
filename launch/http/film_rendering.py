"""Makes the objects of films that clients see from their records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from launch.http.errors import without_paths
from launch.http.film import Film, FilmShotState
from launch.http.film_records import FilmRecord, ShotRecord
from launch.http.rendering import to_error, to_video
from launch.http.video import Status, VideoError


def to_film(film: FilmRecord, keep: float) -> Film:
    """Make the object that a client sees of a film.

    Args:
        keep: seconds for which a film is kept after its end.
    """
    shots = _shots(film.shots, keep)
    status = _status(film, shots)
    first = next((shot.record for shot in film.shots if shot.record is not None), None)
    done = film.ended is not None and not film.problem
    progress = sum(shot.progress for shot in shots) // len(shots)
    length = shots[-1].start + shots[-1].seconds
    return Film(
        id=film.id,
        title=film.title,
        status=status,
        progress=100 if done else min(99, progress),
        created_at=int(film.created),
        completed_at=int(film.ended) if done and film.ended is not None else None,
        expires_at=None if film.ended is None else math.ceil(film.ended + keep),
        seconds=f"{length:.6g}",
        size="" if first is None else first.size,
        error=_error(film),
        shots=shots,
    )


def _shots(shots: Sequence[ShotRecord], keep: float) -> list[FilmShotState]:
    """The shots with the times at which they begin; one whose video was deleted has no length."""
    lengths = [0.0 if s.record is None else s.record.details.frames / s.record.details.fps for s in shots]
    fades = [0.0 if s.record is None else s.fade / s.record.details.fps for s in shots]
    ends = list(accumulate(length - fade for length, fade in zip(lengths, fades, strict=True)))
    return [
        _shot(shot, keep, start=round(end - length, 6), seconds=length)
        for shot, end, length in zip(shots, ends, lengths, strict=True)
    ]


def _shot(shot: ShotRecord, keep: float, *, start: float, seconds: float) -> FilmShotState:
    video = None if shot.record is None else to_video(shot.record, keep)
    return FilmShotState(
        title=shot.title,
        video_id=shot.video,
        status="failed" if video is None else video.status,
        progress=0 if video is None else video.progress,
        start=start,
        seconds=seconds,
        fade=shot.fade,
    )


def _error(film: FilmRecord) -> VideoError | None:
    """Why a film failed; it was `cancelled` if nothing else has happened to its shots."""
    if not film.problem:
        return None
    codes = {code for shot in film.shots if (code := _code(shot))}
    code = "cancelled" if codes == {"cancelled"} else "film_failed"
    return VideoError(code=code, message=without_paths(film.problem))


def _code(shot: ShotRecord) -> str | None:
    """Why there is no video of a shot; None if there is one."""
    if shot.record is None:
        return "deleted"
    error = to_error(shot.record.entry.state, shot.record.entry.reason)
    return None if error is None else error.code


def _status(film: FilmRecord, shots: Sequence[FilmShotState]) -> Status:
    if film.ended is not None:
        return "failed" if film.problem else "completed"
    return "queued" if all(shot.status == "queued" for shot in shots) else "in_progress"
