"""A storyboard with everything decided: what each shot is made from, and where its files go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.jobs import Job
from launch.options import CHECKPOINT_EVERY, DEFAULT_TIMEOUT
from runtime.checkpoint import Checkpoints
from runtime.errors import BadRequestError
from runtime.files import Outputs
from runtime.film import Part
from runtime.presets import load_preset
from runtime.storyboard import ShotRequest, Storyboard, fade_of, load_storyboard
from runtime.topology import Degrees
from runtime.versions import code_version


@dataclass(frozen=True, slots=True)
class Film:
    """A storyboard with everything decided, and where its files go.

    Attributes:
        shots: in order.
        digests: of what each shot is made from.
        only: ids of the shots that are to be made now; empty for all.
        ranks: of the group that makes a shot.
        audio: a track for the film.
        compare: whether shots that are made are measured against the full sampler, too.
    """

    board: Storyboard
    shots: list[ShotRequest]
    digests: list[str]
    out: Path
    only: tuple[str, ...] = ()
    ranks: int | None = None
    audio: Path | None = None
    compare: bool = False

    @property
    def world(self) -> int:
        """Ranks that make a shot together."""
        return self.ranks or 1

    def video(self, number: int) -> Path:
        """The mp4 of a shot."""
        return self.out / "shots" / f"{self.shots[number].shot.id}-{self.digests[number][:12]}.mp4"

    def checkpoints(self, number: int) -> Path:
        """Where a shot's state is kept while it is made."""
        return self.video(number).with_suffix(".checkpoints")

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
        kept = Checkpoints(self.checkpoints(number), every=CHECKPOINT_EVERY, resume=True)
        outputs = Outputs(video, video.with_suffix(".json"), overwrite=True)
        return Job(
            config=one.settings,
            request=one.request,
            outputs=outputs,
            compare=self.compare,
            ranks=self.ranks,
            degrees=Degrees(),
            checkpoints=kept,
            timeout=DEFAULT_TIMEOUT,
        ).absolute()


def plan_film(
    storyboard: Path,
    *,
    out: Path,
    only: Sequence[str] = (),
    ranks: int | None = None,
    audio: Path | None = None,
    compare: bool = False,
) -> Film:
    """Check a whole storyboard and find out what each shot would be made from.

    Raises:
        BadRequestError: see `load_storyboard`; or a file or an id is not there.
    """
    board, shots = load_storyboard(storyboard)
    known = [one.shot.id for one in shots]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise BadRequestError(f"only: {', '.join(unknown)} given; the shots are {', '.join(known)}")
    if audio is not None and not audio.is_file():
        raise BadRequestError(f"audio: {str(audio)!r} given; there is no such file")
    digests = [_digest(one) for one in shots]
    return Film(board, shots, digests, out, tuple(only), ranks, audio, compare)


def _digest(one: ShotRequest) -> str:
    """Of everything that a shot's frames and file depend on."""
    content = {
        "request": one.request.model_dump(exclude={"spectrum", "deadline", "image"}),
        "image": one.image,
        "preset": load_preset(one.request.spectrum).identity,
        "config": one.settings.model_dump(mode="json", exclude={"device", "defaults", "memory", "lora"}),
        "model": one.revision,
        "lockstep": code_version(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
