"""Removes what is no longer to be kept: deleted and expired videos and films, and unused images."""

from __future__ import annotations

import logging
import threading

from launch.http.film_records import FilmRecords
from launch.http.service import Service
from launch.serve.queue import QueueError

log = logging.getLogger("launch")

_EVERY = 10.0  # seconds between two sweeps
_YOUNG = 3600.0  # seconds for which a file without a record may belong to a request that is being made


class Sweeper:
    """Sweeps in a thread while the server runs. Each step may be interrupted and is done again then."""

    def __init__(self, service: Service):
        self._service, self._over = service, threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current sweep."""
        self._over.set()
        self._thread.join()

    def sweep(self) -> None:
        """Remove now what is not to be kept."""
        records, store, keep = self._service.records, self._service.store, self._service.bounds.keep
        films = FilmRecords(records)
        gone = films.expire(keep)
        for id in (*gone, *records.expire(keep)):
            store.remove(id)
        films.forget(gone)
        records.forget()
        videos, images = records.in_use()
        store.remove_unused(images, videos | films.in_use(), _YOUNG)

    def _run(self) -> None:
        while not self._over.wait(_EVERY):
            try:
                self.sweep()
            except (OSError, QueueError) as error:
                log.warning("videos that expired are kept longer: %s", error)
