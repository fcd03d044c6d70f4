"""A storyboard with all options resolved: what each shot is made from, and where its files go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.film.folder import MANIFEST, own_files
from runtime.checkpoint.folder import Checkpoints
from runtime.errors import BadRequestError
from runtime.files.checks import check_apart, refusing
from runtime.film.assemble import Part, check_audio, length
from runtime.film.storyboard import Profile, ShotRequest, Storyboard, fade_of, load_storyboard
from runtime.jobs.defaults import CHECKPOINT_EVERY
from runtime.jobs.job import Job
from runtime.request.config import is_path
from runtime.request.outputs import Outputs


@dataclass(frozen=True, slots=True)
class Film:
    """A storyboard with all options resolved, and the folder of its film.

    Attributes:
        shots: resolved shots, in order.
        out: folder of the film.
        only: ids of the shots to make now; empty for all.
        ranks: number of ranks that make a shot together; None for one.
        audio: sound track of the film.
        compare: also measure the shots against the full sampler.
    """

    board: Storyboard
    shots: list[ShotRequest]
    out: Path
    only: tuple[str, ...] = ()
    ranks: int | None = None
    audio: Path | None = None
    compare: bool = False

    @property
    def world(self) -> int:
        """Number of ranks that make a shot together."""
        return self.ranks or 1

    def video(self, number: int) -> Path:
        """Path of a shot's mp4."""
        return (
            self.out / "shots" / f"{self.shots[number].shot.id}-{self.shots[number].recipe.digest[:12]}.mp4"
        )

    def checkpoints(self, number: int) -> Checkpoints:
        """Checkpoints of a shot while it is made."""
        folder = self.video(number).with_suffix(".checkpoints")
        return Checkpoints(folder, every=CHECKPOINT_EVERY, resume=True)

    def done(self, number: int) -> bool:
        """Return whether all files of a shot exist. They appear right after one another."""
        return all(self.video(number).with_suffix(kind).is_file() for kind in (".mp4", ".json", ".png"))

    @property
    def missing(self) -> list[int]:
        """Numbers of the wanted shots that are not done."""
        wanted = [n for n, one in enumerate(self.shots) if not self.only or one.shot.id in self.only]
        return [number for number in wanted if not self.done(number)]

    def advice(self) -> str:
        """Return how to continue after an interruption."""
        return f"the same command {'makes the remaining shots' if self.missing else 'joins the film'}"

    @property
    def complete(self) -> bool:
        """Whether all shots of the film are done, wanted now or not."""
        return all(self.done(number) for number in range(len(self.shots)))

    @property
    def parts(self) -> list[Part]:
        """Parts that the film is joined from, in order."""
        return [
            Part(one.shot.chapter, self.video(number), one.request.frames, fade_of(one.shot))
            for number, one in enumerate(self.shots)
        ]

    def job(self, number: int) -> Job:
        """Job that makes a shot."""
        one, video = self.shots[number], self.video(number)
        outputs = Outputs(video, video.with_suffix(".json"), overwrite=True)
        return Job.build(
            one.settings,
            one.request,
            outputs,
            preset=one.preset,
            compare=self.compare,
            ranks=self.ranks,
            checkpoints=self.checkpoints(number),
            recipe=one.recipe,
            chosen=one.chosen,
        ).absolute()


def plan_film(
    storyboard: Path,
    *,
    out: Path,
    only: Sequence[str] = (),
    ranks: int | None = None,
    audio: Path | None = None,
    compare: bool = False,
    profile: Profile | None = None,
) -> Film:
    """Check a whole storyboard and resolve what each shot is made from.

    Args:
        storyboard, out, only, ranks, audio, compare: as in `Film`; `storyboard` is its file.
        profile: see `load_storyboard`.

    Raises:
        BadRequestError: see `load_storyboard`; or an id is unknown, the track has no sound, or the film would
            replace one of its own inputs.
    """
    board, shots = load_storyboard(storyboard, profile)
    known = [one.shot.id for one in shots]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise BadRequestError(f"only: {', '.join(unknown)} given; the shots are {', '.join(known)}")
    with refusing("out", out):
        (out / MANIFEST).exists()
    check_apart(own_files(out), _inputs(storyboard, shots, audio))
    film = Film(board, shots, out, tuple(only), ranks, audio, compare)
    if audio is not None and (problem := check_audio(audio, length(film.parts) / shots[0].fps)):
        raise BadRequestError(f"audio: {str(audio)!r} given; {problem}")
    return film


def _inputs(storyboard: Path, shots: Sequence[ShotRequest], audio: Path | None) -> dict[Path, str]:
    """Input files of a film → the field that names each."""
    named: list[tuple[str | Path | None, str]] = [(storyboard, "storyboard"), (audio, "audio")]
    for one in shots:
        named += [(one.request.image, "image"), *((lora.file, "lora") for lora in one.settings.lora)]
        named.append((one.preset.calibration_file, "calibration"))
        files = {one.config: "config", one.request.spectrum: "spectrum"}
        named += [(name, field) for name, field in files.items() if is_path(name)]
    return {Path(name): field for name, field in named if name is not None}
