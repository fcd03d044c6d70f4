"""`lockstep storyboard`: makes the shots of a storyboard on replicas, and joins them into one film.

Everything lies in one folder, and a shot's files are named after the digest of what they were made from, so
existing shots are not made again:

    shots/<id>-<digest>.mp4, .json, .png    one shot, its report and its picture
    queue/                                  requests for the missing shots
    film.mp4, film.html, poster.png, contact-sheet.png, manifest.json
    lockstep.lock                           held by the process that makes the film
"""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.film.folder import (
    FILM,
    MANIFEST,
    OPEN,
    PAGE,
    POSTER,
    QUEUE,
    SHEET,
    held,
    is_shot,
    request_name,
)
from launch.film.prune import find_replaced, summary
from launch.film.shots import Film
from launch.film.view import shown_live
from launch.serve.entries import State
from launch.serve.queue import Queue
from launch.shell.terminal import Terminal
from runtime.errors import CancelledError, JobFailedError, reason
from runtime.files.atomic import whole_file
from runtime.film.assemble import join_film, length, starts, write_contact_sheet, write_poster
from runtime.film.page import Scene, write_page
from runtime.reports.report import Report
from runtime.versions import versions


def make_film(film: Film, replicas: int, console: Console) -> Path | None:
    """Make the missing shots and join the film; returns its path, or None if other shots are missing.

    Raises:
        BadRequestError: the folder cannot be written, or another process makes a film in it.
        JobFailedError: a shot could not be made; the others were.
        CancelledError: stopped by a signal.
    """
    with held(film.out):
        missing = film.missing
        console.print(f"{len(missing)} of {len(film.shots)} shots to make")
        if missing:
            _render(film, replicas, console)
        _remove_checkpoints(film)
        for number in missing if console.is_terminal else ():  # else they were printed as the shots ended
            for warning in _report(film, number).warnings:
                console.print(f"warning: shot {film.shots[number].shot.id!r}: {warning}", soft_wrap=True)
        if not film.complete:
            console.print("the film is not joined: shots outside --only are missing")
            return None
        path = assemble(film)
        if replaced := find_replaced(film):
            console.print(f"{summary(replaced)}, are kept; the same command with --prune removes them")
        return path


def _render(film: Film, replicas: int, console: Console) -> None:
    """Make the missing shots; raise for those that could not be made."""
    from launch.cluster.address import cluster_address
    from launch.cluster.cluster import on_cluster
    from runtime.parallel.devices import check_room

    if cluster_address() is None:  # refuse before anything is submitted
        check_room(min(replicas, len(film.missing)) * film.world, "cpu")
    with closing(Queue(film.out / QUEUE)) as queue, queue.served():
        submitted = _submit(film, queue)  # only if no other pool serves the queue
    count = min(replicas, len(submitted))
    about = {"storyboard": film.board.title, "replicas": str(count)}
    if on_cluster(count * film.world, about, partial(_serve, film, submitted, count, console), console):
        raise CancelledError("finished shots are kept")
    with closing(Queue(film.out / QUEUE)) as queue:
        entries = [queue.entry(id) for id in submitted.values()]
    failed = [f"{entry.name}: {entry.reason}" for entry in entries if entry.state is not State.DONE]
    if failed:
        raise JobFailedError("\n".join([f"{len(failed)} of {len(entries)} shots could not be made", *failed]))


def _serve(film: Film, submitted: dict[int, int], replicas: int, console: Console, driver: Any) -> bool:
    """Make the shots, in a driver process; returns whether it was told to stop."""
    from launch.serve.events import print_event
    from launch.serve.pool import ReplicaPool

    said = Terminal(stderr=True, quiet=True) if console.is_terminal else console
    with closing(Queue(film.out / QUEUE)) as queue:
        if driver.again:
            _end_done(film, submitted, queue)
        pool = ReplicaPool(queue, replicas, partial(print_event, said), driver.pulse, driver.look)
        with driver.stopped_by_signals(pool.stop), shown_live(console, film, queue, submitted):
            pool.run(again=driver.again)
        return pool.ending


def _end_done(film: Film, submitted: dict[int, int], queue: Queue) -> None:
    """End requests of shots that were done when an earlier driver was lost, before it could say so."""
    for number, id in submitted.items():
        if queue.entry(id).state is State.RUNNING and film.done(number):
            queue.end(id, State.DONE)


def _remove_checkpoints(film: Film) -> None:
    """Remove checkpoints of finished shots, which a driver that was killed in between leaves behind."""
    for number in range(len(film.shots)):
        if film.done(number):
            film.checkpoints(number).remove()


def _submit(film: Film, queue: Queue) -> dict[int, int]:
    """Submit the missing shots, unless they are in the queue; returns shot → number of its request."""
    jobs = {number: film.job(number) for number in film.missing}
    wanted = {job.to_json(): number for number, job in jobs.items()}
    submitted = {}
    for entry in filter(is_shot, queue.entries(*OPEN)):
        number = wanted.get(entry.text)
        if number is None or number in submitted or entry.unwanted:
            queue.cancel(entry.id)  # from an older storyboard, or other options
        else:
            submitted[number] = entry.id
    tries = len(queue.entries())
    for number, job in jobs.items():
        if number not in submitted:
            name = request_name(film.video(number), tries)
            submitted[number] = queue.submit(job, name=name, owner=film.board.title)
    return submitted


def assemble(film: Film) -> Path:
    """Join the shots, all of which exist, and write the film's page, pictures and manifest."""
    parts, path = film.parts, film.out / FILM
    join_film(parts, path, title=film.board.title, fps=film.shots[0].fps, audio=film.audio)
    write_poster(parts, film.out / POSTER)
    write_contact_sheet(parts, film.out / SHEET)
    write_page(_scenes(film), film.out / PAGE, title=film.board.title, fps=film.shots[0].fps)
    with whole_file(film.out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(_manifest(film), indent=2) + "\n", encoding="utf-8")
    return path


def _scenes(film: Film) -> list[Scene]:
    return [
        Scene(one.shot.id, part, _report(film, number))
        for number, (one, part) in enumerate(zip(film.shots, film.parts, strict=True))
    ]


def _report(film: Film, number: int) -> Report:
    path = film.video(number).with_suffix(".json")
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise JobFailedError(
            f"{str(path)!r} is not a report ({reason(error)}); remove it, and the shot is made again"
        ) from None


def _manifest(film: Film) -> dict[str, Any]:
    """Content of the manifest: what every file was made from."""
    parts = film.parts
    return {
        "schema": 1,
        "title": film.board.title,
        "film": {"file": FILM, "frames": length(parts), "fps": film.shots[0].fps},
        "audio": None if film.audio is None else str(film.audio),
        "shots": [
            {
                "id": one.shot.id,
                "title": one.shot.chapter,
                "file": str(part.video.relative_to(film.out)),
                "report": str(part.video.with_suffix(".json").relative_to(film.out)),
                "digest": digest,
                "start": start,
                "transition": one.shot.transition.model_dump(),
                "config": one.config,
                "lora": [lora.model_dump() for lora in one.settings.lora],
                "request": one.request.model_dump(),
            }
            for one, part, digest, start in zip(
                film.shots, parts, [shot.recipe.digest for shot in film.shots], starts(parts), strict=True
            )
        ],
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
