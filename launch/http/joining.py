"""Joins the videos of films whose shots are all finished."""

from __future__ import annotations

import logging

from launch.http.assets import FILM, POSTER, SHEET, Store
from launch.http.film_records import FilmRecord, FilmRecords
from launch.http.service import Service
from runtime.errors import JobFailedError, named
from runtime.film.assemble import Part, join_film, write_contact_sheet, write_poster

log = logging.getLogger("launch")

EVERY = 1.0  # seconds between two looks


class Joiner:
    """Joins the shots of films; an interrupted join is repeated by the next server."""

    def __init__(self, service: Service):
        self._films, self._store = FilmRecords(service.records), service.store

    def join(self) -> None:
        """Join every film whose shots are finished; one that can no longer be joined has failed."""
        for film in self._films.unjoined():
            if film.whole:
                self._films.end(film.id, self._joined(film))
            elif not film.open:
                self._films.end(film.id, _missing(film))

    def _joined(self, film: FilmRecord) -> str:
        """Write a film's files; returns why that is not possible, or nothing."""
        pieces = parts(film, self._store)
        folder = self._store.film(film.id)
        fps = next(shot.record.details.fps for shot in film.shots if shot.record is not None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            join_film(pieces, folder / FILM, title=film.title, fps=fps)
            write_poster(pieces, folder / POSTER)
            write_contact_sheet(pieces, folder / SHEET)
        except (JobFailedError, OSError) as error:
            log.warning("%s: %s", film.id, error)
            return str(error)
        except Exception as error:  # the next film must not wait for this one for ever
            log.exception("%s: unexpected failure", film.id)
            return f"unexpected failure: {named(error)}"
        return ""


def parts(film: FilmRecord, store: Store) -> list[Part]:
    """Parts that a film is joined from, in order."""
    return [
        Part(shot.title, store.video(shot.video), shot.record.details.frames, shot.fade)
        for shot in film.shots
        if shot.record is not None
    ]


def _missing(film: FilmRecord) -> str:
    """Why a film's shots cannot be joined."""
    said = []
    for number, shot in enumerate(film.shots, 1):
        if shot.record is None:
            said.append(f"shot {number}: its video was deleted")
        elif shot.record.entry.reason:
            said.append(f"shot {number}: {shot.record.entry.reason}")
    return "\n".join(said)
