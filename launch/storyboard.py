"""`lockstep storyboard`: a storyboard file → shots on replicas → one film.

Everything lies in one folder, and a shot's files are named after what they were made from, so what is there
already is not made again:

    shots/<id>-<digest>.mp4, .json, .png    one shot, its report and its picture
    queue/                                  shots that are not done yet, and their checkpoints are beside them
    film.mp4, poster.png, contact-sheet.png, manifest.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.entries import State
from launch.jobs import Job
from launch.options import CHECKPOINT_EVERY, DEFAULT_TIMEOUT
from launch.queue import Queue
from runtime.checkpoint import Checkpoints
from runtime.configs import Config, load_config
from runtime.errors import BadRequestError, CancelledError, JobFailedError
from runtime.files import Outputs, check_writable, whole_file
from runtime.film import Part, join_film, length, starts, write_contact_sheet, write_poster
from runtime.presets import load_preset
from runtime.report import versions
from runtime.storyboard import ShotRequest, Storyboard, fade_of, load_storyboard
from runtime.topology import Degrees
from runtime.weights import find_model
from spectrum import StepKind

_TIMED = ("width", "height", "guidance")  # what the time of a step depends on, beside the model
_OPEN = (State.WAITING, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Film:
    """A storyboard with everything decided, and where its files go.

    Attributes:
        shots: in order.
        digests: of what each shot is made from.
        only: ids of the shots that are to be made now; empty for all.
        ranks: of the group that makes a shot.
        audio: a track for the film.
    """

    board: Storyboard
    shots: list[ShotRequest]
    digests: list[str]
    out: Path
    only: tuple[str, ...] = ()
    ranks: int | None = None
    audio: Path | None = None

    def video(self, number: int) -> Path:
        """The mp4 of a shot."""
        return self.out / "shots" / f"{self.shots[number].shot.id}-{self.digests[number][:12]}.mp4"

    def done(self, number: int) -> bool:
        """Whether a shot is there. Its picture is written last."""
        return all(self.video(number).with_suffix(kind).is_file() for kind in (".mp4", ".json", ".png"))

    @property
    def missing(self) -> list[int]:
        """Shots that are not there yet, of those that are wanted."""
        wanted = [n for n, one in enumerate(self.shots) if not self.only or one.shot.id in self.only]
        return [number for number in wanted if not self.done(number)]

    @property
    def complete(self) -> bool:
        return all(self.done(number) for number in range(len(self.shots)))

    @property
    def parts(self) -> list[Part]:
        """What the film is joined from."""
        return [
            Part(one.shot.chapter, self.video(number), one.request.frames, fade_of(one.shot))
            for number, one in enumerate(self.shots)
        ]

    def job(self, number: int) -> Job:
        """What makes a shot."""
        one, video = self.shots[number], self.video(number)
        kept = Checkpoints(video.with_suffix(".checkpoints"), every=CHECKPOINT_EVERY, resume=True)
        outputs = Outputs(video, video.with_suffix(".json"), overwrite=True)
        return Job(
            config=load_config(one.config),
            request=one.request,
            outputs=outputs,
            compare=False,
            ranks=self.ranks,
            degrees=Degrees(),
            checkpoints=kept,
            timeout=DEFAULT_TIMEOUT,
        ).absolute()


def plan_film(
    storyboard: Path, *, out: Path, only: Sequence[str], ranks: int | None, audio: Path | None
) -> Film:
    """Check a whole storyboard and find out what each shot would be made from.

    Raises:
        BadRequestError: see `load_storyboard`; or a model, a file or an id is not there.
    """
    board, shots = load_storyboard(storyboard)
    known = [one.shot.id for one in shots]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise BadRequestError(f"only: {', '.join(unknown)} given; the shots are {', '.join(known)}")
    if audio is not None and not audio.is_file():
        raise BadRequestError(f"audio: {str(audio)!r} given; there is no such file")
    revisions: dict[str, str] = {}
    digests = []
    for one in shots:
        config = load_config(one.config)
        if one.config not in revisions:
            revisions[one.config] = find_model(config).revision
        digests.append(_digest(one, config, revisions[one.config]))
    return Film(board, shots, digests, out, tuple(only), ranks, audio)


def _digest(one: ShotRequest, config: Config, revision: str) -> str:
    """Of everything that a shot's frames and file depend on."""
    content = {
        "request": one.request.model_dump(exclude={"spectrum", "deadline"}),
        "preset": load_preset(one.request.spectrum).identity,
        "config": config.model_dump(mode="json", exclude={"device", "defaults", "memory"}),
        "model": revision,
        "lockstep": version("lockstep-video"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_film(film: Film, replicas: int, console: Console) -> Path | None:
    """Render what is missing and join the film; its path, or None if shots that were not wanted are missing.

    Raises:
        BadRequestError: the folder cannot be written to, or another process makes films in it.
        JobFailedError: a shot could not be made; the others were.
        CancelledError: it was told to stop; the same command goes on.
    """
    check_writable(film.out / "film.mp4", overwrite=True)
    (film.out / "shots").mkdir(exist_ok=True)
    found = len(film.shots) - len(film.missing)
    console.print(f"{found} of {len(film.shots)} shots need no rendering", highlight=False)
    if film.missing:
        _render(film, replicas, console)
    if not film.complete:
        console.print("not joined: other shots of the film are missing", highlight=False)
        return None
    return assemble(film)


def _render(film: Film, replicas: int, console: Console) -> None:
    """Make the missing shots, and say which could not be made."""
    from launch.queue_commands import print_event
    from launch.ray_cluster import cluster
    from launch.ray_pool import ReplicaPool
    from launch.signals import stopped_by_signals

    with closing(Queue(film.out / "queue")) as queue:
        submitted = _submit(film, queue)
        count = min(replicas, len(submitted))
        about = {"storyboard": film.board.title, "replicas": str(count)}
        with cluster(count * (film.ranks or 1), about):
            pool = ReplicaPool(queue, count, partial(print_event, console))
            with stopped_by_signals(pool.stop):
                pool.run()
        if pool.ending:
            raise CancelledError("stopped; the same command goes on with the shots that are left")
        entries = [queue.entry(id) for id in submitted]
    failed = [f"{entry.name}: {entry.reason}" for entry in entries if entry.state is not State.DONE]
    if failed:
        raise JobFailedError("\n".join([f"{len(failed)} shots could not be made", *failed]))


def _submit(film: Film, queue: Queue) -> list[int]:
    """Numbers of the requests for the missing shots; those that wait already are not asked for twice."""
    waiting = {entry.name.partition("@")[0]: entry.id for entry in queue.entries(*_OPEN)}
    tries = len(queue.entries())
    submitted = []
    for number in film.missing:
        name = film.video(number).stem
        if name not in waiting:
            waiting[name] = queue.submit(film.job(number), name=f"{name}@{tries}", owner=film.board.title)
        submitted.append(waiting[name])
    for entry in queue.entries(*_OPEN):
        if entry.id not in submitted:  # of an older version of the storyboard
            queue.cancel(entry.id)
    return submitted


def assemble(film: Film) -> Path:
    """Join the shots, all of which are there, and write what goes with the film."""
    parts, path = film.parts, film.out / "film.mp4"
    join_film(parts, path, title=film.board.title, fps=film.shots[0].fps, audio=film.audio)
    write_poster(parts, film.out / "poster.png")
    write_contact_sheet(parts, film.out / "contact-sheet.png")
    with whole_file(film.out / "manifest.json") as temporary:
        temporary.write_text(json.dumps(_manifest(film), indent=2) + "\n", encoding="utf-8")
    return path


def _manifest(film: Film) -> dict[str, Any]:
    """What made every file."""
    parts = film.parts
    return {
        "schema": 1,
        "title": film.board.title,
        "film": {"file": "film.mp4", "frames": length(parts), "fps": film.shots[0].fps},
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
                "request": one.request.model_dump(),
            }
            for one, part, digest, start in zip(film.shots, parts, film.digests, starts(parts), strict=True)
        ],
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a shot takes. `seconds` of denoising is None where no step was timed yet."""

    windows: int
    nfe: int
    seconds: float | None


def estimate(film: Film, number: int) -> Estimate:
    """Evaluations of a shot, and the time by the reports of other shots or its preset's calibration."""
    one = film.shots[number]
    config, preset = load_config(one.config), load_preset(one.request.spectrum)
    kinds = preset.expected_kinds(one.request.steps)
    windows = _windows(one, config)
    nfe = kinds.count(StepKind.COMPUTE)
    times = _step_times(film, one)
    if times is None and preset.calibrated is not None:
        known = preset.calibrated.seconds
        times = known.computed, known.forecast
    if times is None:
        return Estimate(windows, nfe, None)
    return Estimate(windows, nfe, windows * (nfe * times[0] + (len(kinds) - nfe) * times[1]))


def _windows(one: ShotRequest, config: Config) -> int:
    if config.window is None or one.request.frames <= config.window.frames:
        return 1
    stride = config.window.frames - 1 + 4 - config.window.overlap
    return -(-(one.request.frames - config.window.frames) // stride) + 1


def _step_times(film: Film, one: ShotRequest) -> tuple[float, float] | None:
    """Seconds of a computed and a forecast step of one window, from a report of a shot of this kind."""
    for path in sorted((film.out / "shots").glob("*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            same = all(
                report["request"][k] == getattr(one.request, k) for k in ("width", "height", "guidance")
            )
            measured, windows = report["step_seconds"], report["windows"]
            if same and measured["computed_median"] is not None:
                return measured["computed_median"] / windows, (measured["forecast_median"] or 0.0) / windows
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def dry_run_table(film: Film) -> Table:
    """Shots, what they take, and which of them are there."""
    table = Table(title=f"{film.board.title}: {len(film.shots)} shots, {length(film.parts)} frames")
    for column in ("shot", "frames", "windows", "NFE", "denoising, s", "rank-seconds", ""):
        table.add_column(column, justify="left" if column in ("shot", "") else "right")
    total, known = 0.0, True
    for number, one in enumerate(film.shots):
        needed = number in film.missing
        expected = estimate(film, number)
        if needed:
            total, known = total + (expected.seconds or 0.0), known and expected.seconds is not None
        seconds = "unknown" if expected.seconds is None else f"{expected.seconds:.1f}"
        cost = "unknown" if expected.seconds is None else f"{expected.seconds * (film.ranks or 1):.1f}"
        state = "done" if film.done(number) else "to do" if needed else "not wanted"
        table.add_row(
            one.shot.id,
            str(one.request.frames),
            str(expected.windows),
            str(expected.nfe),
            seconds,
            cost,
            state,
        )
    table.caption = f"to do: {total:.1f} s of denoising{'' if known else ', and what is unknown'}"
    return table
