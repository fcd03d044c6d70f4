"""Files: where a job's go, how they appear whole or not at all, and whether an image is one."""

from __future__ import annotations

import glob
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image, UnidentifiedImageError

from runtime.errors import BadRequestError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; when the block ends well, it is flushed to disk and renamed to `path`.

    When the block raises, whatever was written is removed and `path` stays as it was; if the process is
    killed, the next one on this machine that writes `path` removes it. The temporary name keeps the suffix of
    `path`, which ffmpeg goes by.
    """
    mine, suffix = f".{path.stem}.{socket.gethostname()}.", f".part{path.suffix}"
    _remove_orphans(path.parent, mine, suffix)
    descriptor, name = tempfile.mkstemp(prefix=f"{mine}{os.getpid()}.", suffix=suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_orphans(folder: Path, prefix: str, suffix: str) -> None:
    """Temporary files whose process is no more."""
    for orphan in folder.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        process = orphan.name.removeprefix(prefix).split(".")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            orphan.unlink(missing_ok=True)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before any work is done for it. Makes missing folders.

    Raises:
        BadRequestError: the file exists and `overwrite` is false, or its folder cannot be written to.
    """
    if path.is_dir():
        raise BadRequestError(f"out: {str(path)!r} given; it is a folder, a file name is needed")
    if path.exists() and not overwrite:
        raise BadRequestError(f"out: {str(path)!r} exists; give another name or --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadRequestError(f"out: cannot write in {str(path.parent)!r}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the files of one job go.

    Attributes:
        video: the mp4; with several videos their numbers are put before the suffix.
        report: the JSON; the picture lies beside it.
        overwrite: whether files that exist may be replaced.
    """

    video: Path
    report: Path
    overwrite: bool = False

    @property
    def picture(self) -> Path:
        return self.report.with_suffix(".png")

    def videos(self, count: int) -> list[Path]:
        if count == 1:
            return [self.video]
        return [self.video.with_stem(f"{self.video.stem}-{number}") for number in range(1, count + 1)]

    def check(self, count: int) -> None:
        """Refuse names that cannot be written.

        Raises:
            BadRequestError: a name has the wrong suffix, or see `check_writable`.
        """
        if self.video.suffix != ".mp4":
            raise BadRequestError(f"out: {str(self.video)!r} given; the name must end in .mp4")
        if self.report.suffix != ".json":
            raise BadRequestError(f"report: {str(self.report)!r} given; the name must end in .json")
        for path in (*self.videos(count), self.report, self.picture):
            check_writable(path, overwrite=self.overwrite)


def image_digest(path: str) -> str:
    """SHA-256 of an image's file, which is looked into.

    Raises:
        BadRequestError: there is none, or it is no image.
    """
    try:
        with Image.open(path) as image:
            image.verify()
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except UnidentifiedImageError:
        raise BadRequestError(f"image: {path!r} given; it is no image") from None
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files
        raise BadRequestError(f"image: {path!r} given; it cannot be read: {error}") from None


def check_image(path: str | None) -> None:
    """Refuse an image that cannot be read, before any work is done for it.

    Raises:
        BadRequestError: see `image_digest`.
    """
    if path is not None:
        image_digest(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
