"""Records of the API's videos, in the file of the queue, so that an accepted request is never lost."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.http.errors import ApiError, not_found
from launch.http.keys import Key
from launch.http.once import made_by, remember
from launch.http.quotas import HOUR, OPEN, check_quotas
from launch.http.tables import TABLES
from launch.http.video import RequestDetails, VideoCreate
from launch.serve.entries import Entry, State, read_entry
from launch.serve.queue import Queue
from runtime.jobs.job import Job

_DAY = 86400.0
_VIDEO = (
    "SELECT videos.id AS video, videos.created, videos.asked, videos.details, videos.size, videos.image, "
    "videos.remixed, videos.film, videos.deleted, requests.* "
    "FROM videos JOIN requests ON requests.id = videos.request "
)
SEEN = "videos.owner = ? AND NOT videos.deleted"
_LIKE = (
    f"{_VIDEO} WHERE {SEEN} AND videos.asked = ? AND videos.image IS ? "
    "AND state IN ('waiting', 'running', 'done') ORDER BY videos.number DESC LIMIT 1"
)
_NEEDED = (
    "SELECT shots.video FROM shots JOIN films ON films.id = shots.film WHERE films.ended IS NULL "
    "AND NOT films.deleted"
)


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
        shared: whether a video of the same request that has not failed serves as well.
    """

    id: str
    asked: VideoCreate
    details: RequestDetails
    size: str
    image: str | None = None
    remixed: str | None = None
    film: str | None = None
    idempotency: tuple[str, str] | None = None
    shared: bool = False


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


def new_id(kind: str = "video") -> str:
    """Make an id that nobody can guess."""
    return f"{kind}_{secrets.token_hex(16)}"


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
            The video, and whether an earlier request had made it: one with the same idempotency key, or any
            that was the same if the video is `shared`.

        Raises:
            ApiError: the quotas are used up, or the idempotency key was used for another request.
            BadRequestError: the queue refuses the job.
        """
        with self.queue.transaction() as base:
            record = self._earlier(base, new.idempotency, key.owner)
            if record is None and new.shared:
                record = self._like(base, new.asked, new.image, key.owner)
            replayed = record is not None
            if record is None:
                self.check_quotas(base, key)
                self.insert(base, new, job, key.owner)
                record = self.one(base, new.id, key.owner)
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
        id = None if once is None else made_by(base, once, owner)
        return None if id is None else self.one(base, id, owner)

    def like(self, asked: VideoCreate, image: str | None, owner: str) -> Record | None:
        """The newest video of an owner that was made by the same request and has not failed, if there is one.

        Args:
            asked, image: as of `NewVideo`.
        """
        with self.queue.transaction() as base:
            record = self._like(base, asked, image, owner)
        return None if record is None else self._placed(record)

    def _like(
        self, base: sqlite3.Connection, asked: VideoCreate, image: str | None, owner: str
    ) -> Record | None:
        """As `like`, within a transaction."""
        row = base.execute(_LIKE, (owner, _told(asked), image)).fetchone()
        return None if row is None else _read(row)

    def check_quotas(self, base: sqlite3.Connection, key: Key, count: int = 1) -> None:
        """Refuse `count` more requests if they would be too many; see `quotas.check_quotas`."""
        check_quotas(base, key, self._most, count)

    def insert(self, base: sqlite3.Connection, new: NewVideo, job: Job, owner: str) -> None:
        """Add a video and its request, within the transaction `base`."""
        asked = new.asked
        request = self.queue.insert(
            base, job, name=new.id, owner=owner, priority=asked.priority, seconds=asked.expires
        )
        details, told = new.details.model_dump_json(), _told(asked)
        base.execute(
            "INSERT INTO videos (id, request, owner, created, asked, details, size, image, remixed, film) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (new.id, request, owner, time.time(), told, details, new.size, new.image, new.remixed, new.film),
        )
        if new.idempotency is not None:
            remember(base, new.idempotency, owner, new.id)

    def video(self, id: str, owner: str) -> Record:
        """Video of an owner, by its id.

        Raises:
            ApiError: the owner has no video of this id.
        """
        found = self.queue.read(_read, f"{_VIDEO} WHERE videos.id = ? AND {SEEN}", id, owner)
        if not found:
            raise not_found("video", id)
        return self._placed(found[0])

    def one(self, base: sqlite3.Connection, id: str, owner: str) -> Record:
        """As `video`, within the transaction `base`."""
        row = base.execute(f"{_VIDEO} WHERE videos.id = ? AND {SEEN}", (id, owner)).fetchone()
        if row is None:
            raise not_found("video", id)
        return _read(row)

    def some(self, owner: str, ids: Sequence[str]) -> dict[str, Record]:
        """Videos of an owner, by id; ids without a video are left out."""
        marks = ", ".join("?" * len(ids))
        found = self.queue.read(_read, f"{_VIDEO} WHERE {SEEN} AND videos.id IN ({marks})", owner, *ids)
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
        query = f"{_VIDEO} WHERE {SEEN} AND number {sign} ? ORDER BY number {order} LIMIT ?"
        found = self.queue.read(_read, query, owner, start, limit + 1)
        waiting = "SELECT id FROM requests WHERE state = 'waiting' ORDER BY priority DESC, id"
        places = {id: place for place, id in enumerate(self.queue.read(_number, waiting))}
        return [replace(one, ahead=places.get(one.entry.id)) for one in found[:limit]], len(found) > limit

    def cancel(self, id: str, owner: str) -> Record:
        """Cancel a video: a waiting one ends now, a running one after a step, an ended one stays as it is."""
        with self.queue.transaction() as base:
            record = self.one(base, id, owner)
            self.queue.cancel_in(base, record.entry.id)
            return self.one(base, id, owner)

    def resume(self, id: str, key: Key) -> Record:
        """Resume a video that failed or was cancelled from its last checkpoint, within the quotas.

        Raises:
            ApiError: it has not ended, or is completed.
        """
        with self.queue.transaction() as base:
            record = self.one(base, id, key.owner)
            if not record.failed:
                said = "only a video that has failed or was cancelled can be resumed"
                raise ApiError(400, "video_not_resumable", said, param="video_id")
            self.resume_in(base, [record], key)
            return self.one(base, id, key.owner)

    def resume_in(self, base: sqlite3.Connection, records: Sequence[Record], key: Key) -> None:
        """Resume videos as `resume` does, all or none, as a part of the transaction `base`."""
        if records:
            self.check_quotas(base, key, len(records))
        for record in records:
            again = self.queue.insert(
                base,
                record.entry.job.retried(),
                name=f"{record.id}.{record.entry.id}",
                owner=key.owner,
                priority=min(record.asked.priority, key.priority),
                seconds=record.asked.expires,
            )
            base.execute("UPDATE videos SET request = ? WHERE id = ?", (again, record.id))

    def delete(self, id: str, owner: str) -> Record:
        """Delete a video: nobody sees it from now on. One that has not ended is cancelled."""
        with self.queue.transaction() as base:
            record = self.one(base, id, owner)
            base.execute("UPDATE videos SET deleted = 1 WHERE id = ?", (id,))
            if not record.ended:
                self.queue.cancel_in(base, record.entry.id)
            return record

    def expire(self, keep: float) -> list[str]:
        """Delete videos that ended more than `keep` seconds ago; return ids of all whose files are to go.

        Shots of a film that is not yet joined are kept until it is.
        """
        with self.queue.transaction() as base:
            ended = f"SELECT id FROM requests WHERE NOT {OPEN}"
            base.execute(
                f"UPDATE videos SET deleted = 1 WHERE request IN ({ended} AND ended < ?) "
                f"AND id NOT IN ({_NEEDED})",
                (time.time() - keep,),
            )
            rows = base.execute(f"SELECT id FROM videos WHERE deleted AND request IN ({ended})")
            return [row["id"] for row in rows]

    def forget(self) -> None:
        """Remove all trace of deleted videos once they no longer count towards a quota."""
        now = time.time()
        gone = (
            "SELECT videos.id FROM videos JOIN requests ON requests.id = request "
            f"WHERE deleted AND created < :hour AND NOT {OPEN} AND ended < :hour"
        )
        with self.queue.transaction() as base:
            for (id,) in base.execute(gone, {"hour": now - HOUR}).fetchall():
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
            f"(SELECT id FROM requests WHERE {OPEN})",
        )
        return {id for id, _ in rows}, {image for _, image in rows if image is not None}


def _told(asked: VideoCreate) -> str:
    """A request as it is stored."""
    return asked.model_dump_json(exclude={"input_reference"})


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


def _number(row: sqlite3.Row) -> int:
    return int(row[0])
