"""Records of the API's videos, in the file of the queue, so that an accepted request is never lost."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.http.errors import ApiError, not_found
from launch.http.keys import Key
from launch.http.tables import TABLES
from launch.http.video import RequestDetails, VideoCreate
from launch.serve.entries import Entry, State, read_entry
from launch.serve.queue import Queue
from runtime.jobs.job import Job

_HOUR, _DAY = 3600.0, 86400.0
_OPEN = "state IN ('waiting', 'running')"
_VIDEO = (
    "SELECT videos.id AS video, videos.created, videos.asked, videos.details, videos.size, videos.image, "
    "videos.remixed, videos.film, videos.deleted, requests.* "
    "FROM videos JOIN requests ON requests.id = videos.request "
)
_SEEN = "videos.owner = ? AND NOT videos.deleted"


@dataclass(frozen=True, slots=True)
class NewVideo:
    """A video to be made.

    Attributes:
        id: from `new_id`.
        asked: the client's request, with its model and seed.
        details: the settings that follow from it.
        size: WIDTHxHEIGHT.
        image: digest of its image in the store.
        remixed: id of the video of which it is a remix.
        film: id of the film for which it is made.
        idempotency: the client's key for the request, and a digest of the request.
    """

    id: str
    asked: VideoCreate
    details: RequestDetails
    size: str
    image: str | None = None
    remixed: str | None = None
    film: str | None = None
    idempotency: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A stored video, with its request in the queue.

    Attributes:
        ahead: number of requests before it; None if it does not wait.
    """

    id: str
    created: float
    asked: VideoCreate
    details: RequestDetails
    size: str
    image: str | None
    remixed: str | None
    film: str | None
    entry: Entry
    ahead: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the video has ended, in whatever way."""
        return self.entry.state not in (State.WAITING, State.RUNNING)

    @property
    def failed(self) -> bool:
        """Whether the video was cancelled or has failed, so that it can be resumed."""
        return self.entry.state in (State.FAILED, State.CANCELLED)


@dataclass(frozen=True, slots=True)
class Event:
    """An event in the life of a video.

    Attributes:
        number: its place in the order of all events.
        kind: `state`, `begun`, `step` or `preview`.
        told: its data.
    """

    number: int
    kind: str
    told: dict[str, Any]
    at: float
    video: str

    @property
    def final(self) -> bool:
        """Whether the video ended with this event."""
        return self.kind == "state" and self.told["state"] not in (State.WAITING, State.RUNNING)


def new_id(kind: str = "video") -> str:
    """Make an id that nobody can guess."""
    return f"{kind}_{secrets.token_hex(16)}"


# An event's request is named after its video, with a number if the video was resumed.
VIDEO_OF_REQUEST = (
    "JOIN requests ON requests.id = events.request "
    f"JOIN videos ON videos.id = substr(requests.name, 1, {len(new_id())})"
)


class Records:
    """Videos of a queue. Every change is one transaction together with the queue's.

    Args:
        queue: the queue that makes the videos.
        most: requests of all owners that may wait or run at a time.
    """

    def __init__(self, queue: Queue, most: int):
        self.queue, self._most = queue, most
        with queue.transaction() as base:
            for statement in TABLES.split(";"):
                base.execute(statement)

    def accept(self, new: NewVideo, job: Job, key: Key) -> tuple[Record, bool]:
        """Accept a video within the owner's quotas; an accepted video ends exactly once, whatever fails.

        Returns:
            The video, and whether an earlier request with the same idempotency key had made it.

        Raises:
            ApiError: the quotas are used up, or the idempotency key was used for another request.
            BadRequestError: the queue refuses the job.
        """
        with self.queue.transaction() as base:
            record = self._earlier(base, new.idempotency, key.owner)
            replayed = record is not None
            if record is None:
                self.check_quotas(base, key)
                self.insert(base, new, job, key.owner)
                record = self._one(base, new.id, key.owner)
        return self._placed(record), replayed

    def earlier(self, idempotency: tuple[str, str] | None, owner: str) -> Record | None:
        """The video of an earlier request with the same idempotency key, if there is one.

        Args:
            idempotency: as of `NewVideo`.

        Raises:
            ApiError: the key was used for another request, or the video was deleted.
        """
        if idempotency is None:
            return None
        with self.queue.transaction() as base:
            record = self._earlier(base, idempotency, owner)
        return None if record is None else self._placed(record)

    def _earlier(self, base: sqlite3.Connection, once: tuple[str, str] | None, owner: str) -> Record | None:
        """As `earlier`, within a transaction."""
        if once is None:
            return None
        name, digest = once
        row = base.execute(
            "SELECT digest, video FROM idempotency WHERE owner = ? AND key = ?", (owner, name)
        ).fetchone()
        if row is None:
            return None
        if row["digest"] != digest:
            said = "this Idempotency-Key was used for another request; use a new one"
            raise ApiError(422, "idempotency_key_reused", said, param="Idempotency-Key")
        return self._one(base, row["video"], owner)

    def check_quotas(self, base: sqlite3.Connection, key: Key, count: int = 1) -> None:
        """Refuse `count` more requests if they would be too many, within the transaction `base`.

        Raises:
            ApiError: the queue or a quota would be exceeded.
        """
        total = base.execute(f"SELECT COUNT(*) FROM requests WHERE {_OPEN}").fetchone()[0]
        if total + count > self._most:
            said = f"{total} requests wait or run, at most {self._most} may; try again later"
            raise ApiError(429, "queue_full", said, retry_after=30)
        if key.queued is not None:
            own = f"SELECT COUNT(*) FROM requests WHERE {_OPEN} AND owner = ?"
            if base.execute(own, (key.owner,)).fetchone()[0] + count > key.queued:
                said = (
                    f"{key.queued} of your requests may wait or run at a time; try again when one has ended"
                )
                raise ApiError(429, "quota_queued", said, retry_after=30)
        if key.per_hour is not None:
            now = time.time()
            times = base.execute(
                "SELECT created FROM videos WHERE owner = ? AND created > ? ORDER BY created",
                (key.owner, now - _HOUR),
            ).fetchall()
            if len(times) + count > key.per_hour:
                said = f"you made {len(times)} requests in the last hour, and your quota is {key.per_hour}"
                first = times[0]["created"] if times else now
                raise ApiError(429, "quota_per_hour", said, retry_after=first + _HOUR - now)

    def insert(self, base: sqlite3.Connection, new: NewVideo, job: Job, owner: str) -> None:
        """Add a video and its request, within the transaction `base`."""
        asked = new.asked
        request = self.queue.insert(
            base, job, name=new.id, owner=owner, priority=asked.priority, seconds=asked.expires
        )
        details, told = new.details.model_dump_json(), asked.model_dump_json(exclude={"input_reference"})
        base.execute(
            "INSERT INTO videos (id, request, owner, created, asked, details, size, image, remixed, film) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (new.id, request, owner, time.time(), told, details, new.size, new.image, new.remixed, new.film),
        )
        if new.idempotency is not None:
            name, digest = new.idempotency
            base.execute(
                "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?)", (owner, name, digest, new.id, time.time())
            )

    def video(self, id: str, owner: str) -> Record:
        """Video of an owner, by its id.

        Raises:
            ApiError: the owner has no video of this id.
        """
        found = self.queue.read(_read, f"{_VIDEO} WHERE videos.id = ? AND {_SEEN}", id, owner)
        if not found:
            raise not_found("video", id)
        return self._placed(found[0])

    def _one(self, base: sqlite3.Connection, id: str, owner: str) -> Record:
        """As `video`, within a transaction."""
        row = base.execute(f"{_VIDEO} WHERE videos.id = ? AND {_SEEN}", (id, owner)).fetchone()
        if row is None:
            raise not_found("video", id)
        return _read(row)

    def some(self, owner: str, ids: Sequence[str]) -> dict[str, Record]:
        """Videos of an owner, by id; ids without a video are left out."""
        marks = ", ".join("?" * len(ids))
        found = self.queue.read(_read, f"{_VIDEO} WHERE {_SEEN} AND videos.id IN ({marks})", owner, *ids)
        return {record.id: record for record in found}

    def _placed(self, record: Record) -> Record:
        """The record of a waiting request with the number of those before it."""
        entry = record.entry
        if entry.state is not State.WAITING:
            return record
        before = "state = 'waiting' AND (priority > ? OR (priority = ? AND id < ?))"
        query = f"SELECT COUNT(*) FROM requests WHERE {before}"
        [ahead] = self.queue.read(_number, query, entry.priority, entry.priority, entry.id)
        return replace(record, ahead=ahead)

    def page(
        self, owner: str, *, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[Record], bool]:
        """A page of an owner's videos in the order in which they were accepted, and whether there are more.

        Args:
            after: id of the last video of the page before.
            limit: most videos on the page.

        Raises:
            ApiError: `after` is not the id of a video.
        """
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        start = 0 if ascending else 2**63 - 1
        if after is not None:
            numbers = self.queue.read(
                _number, "SELECT number FROM videos WHERE id = ? AND owner = ?", after, owner
            )
            if not numbers:
                said = f"after: {after[:80]!r} given; there is no such video"
                raise ApiError(400, "invalid_value", said, param="after")
            start = numbers[0]
        query = f"{_VIDEO} WHERE {_SEEN} AND number {sign} ? ORDER BY number {order} LIMIT ?"
        found = self.queue.read(_read, query, owner, start, limit + 1)
        waiting = "SELECT id FROM requests WHERE state = 'waiting' ORDER BY priority DESC, id"
        places = {id: place for place, id in enumerate(self.queue.read(_number, waiting))}
        return [replace(one, ahead=places.get(one.entry.id)) for one in found[:limit]], len(found) > limit

    def cancel(self, id: str, owner: str) -> Record:
        """Cancel a video: a waiting one ends now, a running one after a step, an ended one stays as it is."""
        with self.queue.transaction() as base:
            record = self._one(base, id, owner)
            self.queue.cancel_in(base, record.entry.id)
            return self._one(base, id, owner)

    def resume(self, id: str, key: Key) -> Record:
        """Resume a video that failed or was cancelled from its last checkpoint, within the quotas.

        Raises:
            ApiError: it has not ended, or is completed.
        """
        with self.queue.transaction() as base:
            record = self._one(base, id, key.owner)
            if not record.failed:
                said = "only a video that has failed or was cancelled can be resumed"
                raise ApiError(400, "video_not_resumable", said, param="video_id")
            self.check_quotas(base, key)
            again = self.queue.insert(
                base,
                record.entry.job.retried(),
                name=f"{id}.{record.entry.id}",
                owner=key.owner,
                priority=record.asked.priority,
                seconds=record.asked.expires,
            )
            base.execute("UPDATE videos SET request = ? WHERE id = ?", (again, id))
            return self._one(base, id, key.owner)

    def delete(self, id: str, owner: str) -> Record:
        """Delete a video: nobody sees it from now on. One that has not ended is cancelled."""
        with self.queue.transaction() as base:
            record = self._one(base, id, owner)
            base.execute("UPDATE videos SET deleted = 1 WHERE id = ?", (id,))
            if not record.ended:
                self.queue.cancel_in(base, record.entry.id)
            return record

    def events(self, owner: str, *, after: int, video: str | None, limit: int) -> list[Event]:
        """Events of an owner's videos, or of one of them, in order.

        Args:
            after: number of the last event that was seen.
        """
        of_one = "" if video is None else "AND videos.id = ?"
        query = (
            "SELECT seq, events.kind AS kind, told, at, videos.id AS video FROM events "
            f"{VIDEO_OF_REQUEST} WHERE seq > ? AND {_SEEN} {of_one} ORDER BY seq LIMIT ?"
        )
        chosen = () if video is None else (video,)
        return self.queue.read(_read_event, query, after, owner, *chosen, limit)

    def expire(self, keep: float) -> list[str]:
        """Delete videos that ended more than `keep` seconds ago; return ids of all whose files are to go."""
        with self.queue.transaction() as base:
            ended = f"SELECT id FROM requests WHERE NOT {_OPEN}"
            base.execute(
                f"UPDATE videos SET deleted = 1 WHERE request IN ({ended} AND ended < ?)",
                (time.time() - keep,),
            )
            rows = base.execute(f"SELECT id FROM videos WHERE deleted AND request IN ({ended})")
            return [row["id"] for row in rows]

    def forget(self) -> None:
        """Remove all trace of deleted videos once they no longer count towards a quota."""
        now = time.time()
        gone = (
            "SELECT videos.id FROM videos JOIN requests ON requests.id = request "
            f"WHERE deleted AND created < :hour AND NOT {_OPEN} AND ended < :hour"
        )
        with self.queue.transaction() as base:
            for (id,) in base.execute(gone, {"hour": now - _HOUR}).fetchall():
                own = "SELECT id FROM requests WHERE name = ? OR name GLOB ? ORDER BY id"
                requests = [row["id"] for row in base.execute(own, (id, f"{id}.*"))]
                if all(self.queue.forget_in(base, request) for request in requests):
                    base.execute("DELETE FROM videos WHERE id = ?", (id,))
            base.execute("DELETE FROM idempotency WHERE at < ?", (now - _DAY,))

    def in_use(self) -> tuple[set[str], set[str]]:
        """Ids of the videos whose files are kept, and digests of their images."""
        rows = self.queue.read(
            tuple,
            "SELECT id, image FROM videos WHERE NOT deleted OR request IN "
            f"(SELECT id FROM requests WHERE {_OPEN})",
        )
        return {id for id, _ in rows}, {image for _, image in rows if image is not None}


def _read(row: sqlite3.Row) -> Record:
    return Record(
        id=row["video"],
        created=row["created"],
        asked=VideoCreate.model_validate_json(row["asked"]),
        details=RequestDetails.model_validate_json(row["details"]),
        size=row["size"],
        image=row["image"],
        remixed=row["remixed"],
        film=row["film"],
        entry=read_entry(row),
    )


def _read_event(row: sqlite3.Row) -> Event:
    return Event(row["seq"], row["kind"], json.loads(row["told"]), row["at"], row["video"])


def _number(row: sqlite3.Row) -> int:
    return int(row[0])
