"""Output files of a job: the videos, the report, its picture and the preview."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.files.checks import check_suffix, check_writable, refusing
from runtime.files.kinds import LATENTS, PICTURE, PREVIEW, REPORT, VIDEO

PREVIEW_MARK: Final = b"Lockstep preview"
"""In every preview; a file that has it may be replaced, as a job that was killed left it."""

_LARGEST_PREVIEW = 8 * 2**20  # bytes; they have some tens of thousands


@dataclass(frozen=True, slots=True)
class Outputs:
    """Paths of a job's output files.

    Attributes:
        video: the mp4; with several videos, a number is put before the suffix.
        report: the JSON report; the picture lies beside it.
        overwrite: whether existing files may be replaced.
        preview: the WebP of previews, which is there only while the job runs; None for no previews.
        latents: the clean latents, with which a longer video can begin; None if they are not kept.
    """

    video: Path
    report: Path
    overwrite: bool = False
    preview: Path | None = None
    latents: Path | None = None

    @classmethod
    def named(
        cls,
        video: Path,
        report: Path | None = None,
        *,
        overwrite: bool = False,
        preview: Path | None = None,
        latents: Path | None = None,
    ) -> Outputs:
        """Name a job's output files; the report lies beside the video unless it is named.

        Raises:
            BadRequestError: a name has the wrong suffix.
        """
        check_suffix(video, ".mp4", field="out")
        if report is not None:
            check_suffix(report, ".json", field="report")
        if preview is not None:
            check_suffix(preview, ".webp", field="preview")
        if latents is not None:
            check_suffix(latents, ".safetensors", field="latents")
        return cls(video, report or video.with_suffix(".json"), overwrite, preview, latents)

    def absolute(self) -> Outputs:
        """Copy it with absolute paths."""
        preview, latents = (
            None if path is None else path.absolute() for path in (self.preview, self.latents)
        )
        return Outputs(self.video.absolute(), self.report.absolute(), self.overwrite, preview, latents)

    @property
    def picture(self) -> Path:
        return self.report.with_suffix(".png")

    def videos(self, count: int) -> list[Path]:
        if count == 1:
            return [self.video]
        return [self.video.with_stem(f"{self.video.stem}-{number}") for number in range(1, count + 1)]

    def all(self, count: int) -> dict[Path, str]:
        """Map every file that is written for `count` videos to the option that names it.

        They appear in this order: the videos that an existing report names belong to its job.
        """
        named = "out" if self.report == self.video.with_suffix(".json") else "report"
        kept = {} if self.latents is None else {self.latents: "latents"}
        return {self.report: named, self.picture: named, **kept, **dict.fromkeys(self.videos(count), "out")}

    def touched(self, count: int) -> dict[Path, str]:
        """Every file that is written at some time, the preview too → the option that names it."""
        shown = {} if self.preview is None else {self.preview: "preview"}
        return self.all(count) | shown

    def state(self, count: int) -> dict[Path, tuple[int, int] | None]:
        """Every file of `count` videos → what tells it from one that replaces it; None without a file."""
        return {path: _state(path) for path in self.all(count)}

    def check(self, count: int) -> None:
        """Refuse names that cannot be written.

        Raises:
            BadRequestError: a name has the wrong suffix, or cannot be written (see `check_writable`).
        """
        check_suffix(self.video, ".mp4", field="out")
        check_suffix(self.report, ".json", field="report")
        fields = self.all(count)
        kinds = {self.report: REPORT, self.picture: PICTURE}
        if self.latents is not None:
            check_suffix(self.latents, ".safetensors", field="latents")
            kinds[self.latents] = LATENTS
        for path in (*self.videos(count), *fields):
            kind = kinds.get(path, VIDEO)
            check_writable(path, overwrite=self.overwrite, field=fields[path], kind=kind)
        if self.preview is not None:
            overwrite = self.overwrite or is_preview(self.preview)
            check_writable(self.preview, overwrite=overwrite, field="preview", kind=PREVIEW)


def is_preview(path: Path) -> bool:
    """Return whether there is a preview at `path`, which an earlier job left."""
    with refusing("preview", path):
        if not path.is_file():  # opening a pipe would wait for its other end
            return False
        try:
            with path.open("rb") as file:
                return PREVIEW_MARK in file.read(_LARGEST_PREVIEW)
        except FileNotFoundError:
            return False


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
