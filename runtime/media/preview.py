"""Previews: small animated pictures of a video while it is being made.

Tensor legend: B videos, T frames, H, W height and width in pixels. Frames are uint8 RGB.
"""

from __future__ import annotations

import io
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from PIL import Image

from runtime.errors import JobFailedError, LockstepError
from runtime.files.atomic import whole_file
from runtime.media.mp4 import Frames
from runtime.request.outputs import PREVIEW_MARK, is_preview

log = logging.getLogger(__name__)

EVERY = 1.0  # seconds from one preview to the next
LONGEST = 256  # pixels of the longer side
MOST_FRAMES = 24
_LARGER = 8  # times at most that a preview is enlarged: what a video is larger than its latents
_PATIENCE = 5.0  # seconds to wait for the last preview


class PreviewSink(Protocol):
    """Receiver of the previews of one generation."""

    @property
    def due(self) -> bool:
        """True if the sink would take a preview now; asking is cheap."""
        ...

    def show(self, frames_BTHW3: Frames, seconds: float) -> None:
        """Show a preview; returns at once.

        Args:
            frames_BTHW3: small frames of each video, in temporal order.
            seconds: how long each frame is shown.
        """
        ...


class Previews:
    """Sink that encodes previews in a thread and delivers each; a context manager.

    It takes at most one preview every `EVERY` seconds, and none while another is being encoded or delivered.

    Args:
        deliver: called in the thread with the bytes of an animated WebP.
        clock: returns seconds; for tests.
    """

    def __init__(self, deliver: Callable[[bytes], object], clock: Callable[[], float] = time.monotonic):
        self._deliver, self._clock = deliver, clock
        self._thread: threading.Thread | None = None
        self._next = -math.inf

    @property
    def due(self) -> bool:
        return self._clock() >= self._next and not self._busy

    @property
    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def show(self, frames_BTHW3: Frames, seconds: float) -> None:
        self._next = self._clock() + EVERY
        make = threading.Thread(target=self._make, args=(frames_BTHW3, seconds), name="preview", daemon=True)
        self._thread = make
        make.start()

    def _make(self, frames_BTHW3: Frames, seconds: float) -> None:
        self._deliver(encode_preview(frames_BTHW3, seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait a limited time for a preview that is still being encoded or delivered."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)


class PreviewFile:
    """File that holds the newest preview; a context manager that removes the file at its end.

    If it cannot be written (a full disk, for instance), one warning is logged: nothing depends on a preview.
    Another file that appears under its name meanwhile is kept.

    Args:
        path: the file, whose name ends in `.webp`; missing folders are created.
        overwrite: whether the first preview may replace a file that is not one.
    """

    def __init__(self, path: Path, *, overwrite: bool = False):
        self.path = path
        self._overwrite = overwrite
        self._warned = self._over = False
        self._lock = threading.Lock()

    def put(self, content: bytes) -> bool:
        """Replace the file, whole or not at all, until it is removed; return whether it was written."""
        with self._lock:
            return not self._over and self._written(content)

    def _written(self, content: bytes) -> bool:
        try:
            if not (self._overwrite or self._is_free()):
                raise JobFailedError("another file has its name, and is kept")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as temporary:
                temporary.write_bytes(content)
        except (OSError, LockstepError) as error:
            if not self._warned:
                log.warning("preview: %r is not up to date: %s", str(self.path), error)
            self._warned = True
            return False
        self._overwrite = False
        return True

    def _is_free(self) -> bool:
        """Return whether nothing is at the path but a preview."""
        return is_preview(self.path) or not os.path.lexists(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock, suppress(OSError, LockstepError):
            self._over = True
            if is_preview(self.path):
                self.path.unlink(missing_ok=True)


def encode_preview(frames_BTHW3: Frames, seconds: float) -> bytes:
    """Encode frames as an animated WebP that loops for ever; several videos are arranged in a grid.

    Args:
        frames_BTHW3: frames of any size; the longer side of the result has at most `LONGEST` pixels.
        seconds: how long each frame is shown.
    """
    pictures = [_resized(Image.fromarray(frame_HW3)) for frame_HW3 in _in_rows(frames_BTHW3)]
    encoded = io.BytesIO()
    pictures[0].save(
        encoded,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=max(1, round(1000 * seconds)),
        loop=0,
        quality=70,
        method=1,
        xmp=PREVIEW_MARK,
    )
    return encoded.getvalue()


def _in_rows(frames_BTHW3: Frames) -> Frames:
    """Arrange the videos in rows, one picture per frame; black where there is none."""
    videos, frames, height, width, _ = frames_BTHW3.shape
    columns = math.ceil(math.sqrt(videos))
    rows = math.ceil(videos / columns)
    cells = np.zeros((rows * columns, frames, height, width, 3), np.uint8)
    cells[:videos] = frames_BTHW3
    cells = cells.reshape(rows, columns, frames, height, width, 3).transpose(2, 0, 3, 1, 4, 5)
    return cells.reshape(frames, rows * height, columns * width, 3)


def _resized(picture: Image.Image) -> Image.Image:
    scale = min(_LARGER, LONGEST / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)
