"""Files of the API: uploaded images, named by their content, and results, named by the id of their video.

    assets/<SHA-256>.png         an image, decoded and encoded again by Lockstep
    results/<video id>/          video.mp4, its report, picture and latents; checkpoints while it is made
    results/<film id>/           film.mp4, poster.png, contact-sheet.png

Ids come from the records and digests from the content, so nothing that a client sends is ever part of a path.
A result is not named by its content, as its path must be known before there is any: its checkpoints lie there
too, and a job that was killed while it wrote its files finds there what it has finished.
Files that others put there stay: Lockstep removes its own by name, and a folder only if it is empty then.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from launch.http.decode import decode_apart
from launch.http.errors import disk_full
from runtime.checkpoint.folder import Checkpoints
from runtime.files.atomic import remove_orphans, whole_file

_RECENT = 64  # uploads whose images are known without decoding them again
_IMAGE = re.compile(r"[0-9a-f]{64}\.png")
_RESULT = re.compile(r"(?:video|film)_[0-9a-f]{32}")
VIDEO, THUMBNAIL, SPRITESHEET = "video.mp4", "thumbnail.webp", "spritesheet.jpg"
LATENTS, BEFORE = "latents.safetensors", "before.safetensors"  # its own, and those that it goes on from
FILM, POSTER, SHEET = "film.mp4", "poster.png", "contact-sheet.png"
_OWN = (VIDEO, "video.json", "video.png", THUMBNAIL, SPRITESHEET, LATENTS, BEFORE, FILM, POSTER, SHEET)


class Store:
    """Files of the API in a queue's folder.

    Args:
        free: bytes that are to stay free on its disk.
    """

    def __init__(self, folder: Path, free: int):
        self._images, self._results, self._free = folder / "assets", folder / "results", free
        self._digests = OrderedDict[bytes, str]()

    def add_image(self, content: bytes) -> str:
        """Store an image, and return the digest by which `image` finds it.

        Raises:
            BadRequestError: it is not an image, or is too large.
            ApiError: the disk is almost full.
        """
        sent = hashlib.sha256(content).digest()
        known = self._digests.get(sent)
        if known is not None and self._is_kept(known):
            return known
        pixels = decode_apart(content)
        digest = hashlib.sha256(pixels).hexdigest()
        if not self._is_kept(digest):
            self.check_room()
            path = self.image(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_bytes(pixels)
        self._digests[sent] = digest
        while len(self._digests) > _RECENT:
            self._digests.popitem(last=False)
        return digest

    def _is_kept(self, digest: str) -> bool:
        """Whether an image is there; it is in use again then, and as young as a new one."""
        try:
            os.utime(self.image(digest))
        except FileNotFoundError:
            return False
        return True

    def image(self, digest: str) -> Path:
        """Path of a stored image."""
        return self._images / f"{digest}.png"

    def video(self, id: str) -> Path:
        """Path of the mp4 of a video; its report and its picture lie beside it."""
        return self._results / id / VIDEO

    def latents(self, id: str) -> Path:
        """The latents of a video; there are none of models that go on from none."""
        return self._results / id / LATENTS

    def lend_latents(self, of: str, to: str) -> Path:
        """Give the latents of one video to another that goes on from them, for as long as that is kept.

        Raises:
            OSError: they are not there, or the disk is full.
        """
        path = (self._results / to / BEFORE).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.hardlink_to(self.latents(of))
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            shutil.copyfile(self.latents(of), path)
        return path

    def film(self, id: str) -> Path:
        """Path of the folder of a film."""
        return self._results / id

    def remove(self, id: str) -> None:
        """Remove all files of a video or a film."""
        _remove_result(self._results / id)

    def room(self) -> int:
        """Free bytes on the disk to which results are written."""
        return shutil.disk_usage(self._results if self._results.is_dir() else self._results.parent).free

    def check_room(self) -> None:
        """Refuse what might find the disk full.

        Raises:
            ApiError: too little is free.
        """
        if self.room() < self._free:
            raise disk_full()

    def remove_unused(self, images: set[str], results: set[str], age: float) -> None:
        """Remove images and results that no record names, and that are older than `age` seconds.

        Args:
            images: digests that are in use.
            results: ids of videos and films that are in use.
        """
        before = time.time() - age
        for folder, ours, used, remove in (
            (self._images, _IMAGE, {f"{digest}.png" for digest in images}, Path.unlink),
            (self._results, _RESULT, results, _remove_result),
        ):
            for path in folder.iterdir() if folder.is_dir() else ():
                with suppress(OSError):
                    if ours.fullmatch(path.name) and path.name not in used and path.lstat().st_mtime < before:
                        remove(path)


def _remove_result(folder: Path) -> None:
    """Remove what Lockstep wrote of a video or a film, and the folder if it is empty then."""
    if folder.is_symlink():
        return
    Checkpoints(Checkpoints.folder_of(folder / VIDEO, None), every=1).remove()
    for name in _OWN:
        remove_orphans(folder / name)
        with suppress(OSError):
            (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()
