"""Removes what is no longer to be kept: deleted and expired videos and films, and unused images."""

from __future__ import annotations

from launch.http.film_records import FilmRecords
from launch.http.service import Service

EVERY = 10.0  # seconds between two sweeps
_YOUNG = 3600.0  # seconds for which a file without a record may belong to a request that is being made


class Sweeper:
    """Removes what is no longer to be kept; a sweep that was interrupted is repeated."""

    def __init__(self, service: Service):
        self._service = service

    def sweep(self) -> None:
        """Remove everything that is no longer to be kept."""
        records, store, keep = self._service.records, self._service.store, self._service.bounds.keep
        films = FilmRecords(records)
        gone = films.expire(keep)
        for id in (*gone, *records.expire(keep)):
            store.remove(id)
        films.forget(gone)
        records.forget()
        videos, images = records.in_use()
        store.remove_unused(images, videos | films.in_use(), _YOUNG)
