"""Records of the API's films: an ordered list of videos each, and how joining them ended."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.http.errors import ApiError, not_found
from launch.http.keys import Key
from launch.http.once import made_by, remember
from launch.http.records import NewVideo, Record, Records
from launch.serve.entries import State
from runtime.jobs.job import Job

_SEEN = "owner = ? AND NOT deleted"


@dataclass(frozen=True, slots=True)
class NewShot:
    """A shot of a film that is to be accepted.

    Attributes:
        video: id of its video.
        made: the video and its job, if it is to be made; None for an existing video.
        fade: frames of the crossfade from the shot before.
    """

    video: str
    title: str
    fade: int
    made: tuple[NewVideo, Job] | None = None


@dataclass(frozen=True, slots=True)
class ShotRecord:
    """A shot of a stored film.

    Attributes:
        record: its video; None if that was deleted.
    """

    video: str
    title: str
    fade: int
    record: Record | None


@dataclass(frozen=True, slots=True)
class FilmRecord:
    """A stored film.

    Attributes:
        ended: when its shots were joined, or could not be; None before.
        problem: why they could not be.
    """

    id: str
    owner: str
    created: float
    title: str
    ended: float | None
    problem: str
    shots: list[ShotRecord]

    @property
    def open(self) -> bool:
        """Whether any of the film's videos has not ended."""
        return any(shot.record is not None and not shot.record.ended for shot in self.shots)

    @property
    def whole(self) -> bool:
        """Whether all of the film's videos are finished."""
        return all(shot.record is not None and shot.record.entry.state is State.DONE for shot in self.shots)


class FilmRecords:
    """Films of a queue, stored beside its videos."""

    def __init__(self, records: Records):
        self._records, self._queue = records, records.queue

    def accept(
        self,
        id: str,
        title: str,
        shots: Sequence[NewShot],
        key: Key,
        once: tuple[str, str] | None = None,
    ) -> str:
        """Accept a film with all its videos or none, within the owner's quotas.

        Args:
            once: from `once_of`.

        Returns:
            Its id, or that of the film that an earlier request with the same idempotency key made.

        Raises:
            ApiError: the quotas do not suffice, or the idempotency key was used for another request.
            BadRequestError: the queue refuses a job.
        """
        made = [shot.made for shot in shots if shot.made is not None]
        with self._queue.transaction() as base:
            if once is not None:
                known = made_by(base, once, key.owner)
                if known is not None:
                    return known
                remember(base, once, key.owner, id)
            self._records.check_quotas(base, key, len(made))
            for new, job in made:
                self._records.insert(base, new, job, key.owner)
            base.execute(
                "INSERT INTO films (id, owner, created, title) VALUES (?, ?, ?, ?)",
                (id, key.owner, time.time(), title),
            )
            base.executemany(
                "INSERT INTO shots (film, place, video, title, fade) VALUES (?, ?, ?, ?, ?)",
                [(id, place, shot.video, shot.title, shot.fade) for place, shot in enumerate(shots)],
            )
        return id

    def earlier(self, once: tuple[str, str] | None, owner: str) -> str | None:
        """Id of the film that an earlier request with the same idempotency key made, if there is one.

        Raises:
            ApiError: the key was used for another request.
        """
        if once is None:
            return None
        with self._queue.transaction() as base:
            return made_by(base, once, owner)

    def film(self, id: str, owner: str) -> FilmRecord:
        """Film of an owner, by its id.

        Raises:
            ApiError: the owner has no film of this id.
        """
        found = self._films(f"WHERE id = ? AND {_SEEN}", id, owner)
        if not found:
            raise not_found("film", id)
        return found[0]

    def page(
        self, owner: str, *, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[FilmRecord], bool]:
        """A page of an owner's films, and whether there are more; arguments as for `Records.page`."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        start = 0 if ascending else 2**63 - 1
        if after is not None:
            query = "SELECT number FROM films WHERE id = ? AND owner = ?"
            numbers = self._queue.read(lambda row: int(row[0]), query, after, owner)
            if not numbers:
                said = f"after: {after[:80]!r} given; there is no such film"
                raise ApiError(400, "invalid_value", said, param="after")
            start = numbers[0]
        query = f"WHERE {_SEEN} AND number {sign} ? ORDER BY number {order} LIMIT ?"
        found = self._films(query, owner, start, limit + 1)
        return found[:limit], len(found) > limit

    def unjoined(self) -> list[FilmRecord]:
        """Films that were neither joined nor given up."""
        return self._films("WHERE ended IS NULL AND NOT deleted")

    def end(self, id: str, problem: str) -> None:
        """Record that a film's shots were joined, or why they could not be."""
        with self._queue.transaction() as base:
            base.execute(
                "UPDATE films SET ended = ?, problem = ? WHERE id = ? AND ended IS NULL",
                (time.time(), problem, id),
            )

    def resume(self, film: FilmRecord, key: Key) -> None:
        """Resume the failed videos of a failed film, all or none, and let it be joined once all are finished.

        Raises:
            ApiError: the quotas do not suffice, or one of its videos was deleted.
        """
        with self._queue.transaction() as base:
            videos = dict.fromkeys(shot.video for shot in film.shots)  # one may be several shots
            shots = [self._records.one(base, id, film.owner) for id in videos]
            self._records.resume_in(base, [shot for shot in shots if shot.failed], key)
            base.execute(
                "UPDATE films SET ended = NULL, problem = '' WHERE id = ? AND problem != ''", (film.id,)
            )

    def delete(self, id: str) -> None:
        """Delete a film: nobody sees it from now on. Its videos stay."""
        with self._queue.transaction() as base:
            base.execute("UPDATE films SET deleted = 1 WHERE id = ?", (id,))

    def expire(self, keep: float) -> list[str]:
        """Delete films that ended more than `keep` seconds ago; returns all whose files are to go."""
        with self._queue.transaction() as base:
            base.execute("UPDATE films SET deleted = 1 WHERE ended < ?", (time.time() - keep,))
            return [row["id"] for row in base.execute("SELECT id FROM films WHERE deleted")]

    def forget(self, ids: Sequence[str]) -> None:
        """Remove all trace of deleted films."""
        with self._queue.transaction() as base:
            for id in ids:
                base.execute("DELETE FROM films WHERE id = ?", (id,))
                base.execute("DELETE FROM shots WHERE film = ?", (id,))

    def in_use(self) -> set[str]:
        """Ids of the films whose files are kept."""
        return {*self._queue.read(lambda row: str(row[0]), "SELECT id FROM films WHERE NOT deleted")}

    def _films(self, where: str, *values: object) -> list[FilmRecord]:
        rows = self._queue.read(dict, f"SELECT * FROM films {where}", *values)
        return [self._film(row) for row in rows]

    def _film(self, row: dict[str, object]) -> FilmRecord:
        owner = str(row["owner"])
        shots = self._queue.read(
            _plain, "SELECT video, title, fade FROM shots WHERE film = ? ORDER BY place", row["id"]
        )
        videos = self._records.some(owner, [shot[0] for shot in shots])
        return FilmRecord(
            id=str(row["id"]),
            owner=owner,
            created=float(str(row["created"])),
            title=str(row["title"]),
            ended=None if row["ended"] is None else float(str(row["ended"])),
            problem=str(row["problem"]),
            shots=[ShotRecord(video, title, fade, videos.get(video)) for video, title, fade in shots],
        )


def _plain(row: sqlite3.Row) -> tuple[str, str, int]:
    return str(row["video"]), str(row["title"]), int(row["fade"])
