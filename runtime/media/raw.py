"""Raw frames in temporary files, for measuring one video against another before any lossy encoding."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from runtime.errors import BadRequestError, reason
from runtime.files.scratch import REMEDY, scratch_file
from runtime.media.mp4 import FrameSink, RawFrames
from runtime.media.quality import RawVideo
from runtime.request.video_request import VideoRequest


@dataclass(frozen=True, slots=True)
class RawSet:
    """Raw files of a request's videos, and the sinks that fill them."""

    videos: list[RawVideo]
    files: list[RawFrames]

    @property
    def sinks(self) -> Sequence[FrameSink]:
        return self.files

    def flush(self) -> None:
        for file in self.files:
            file.flush()


@contextmanager
def raw_videos(request: VideoRequest, count: int) -> Iterator[RawSet]:
    """Open raw files for `count` videos of the size of `request`, removed at the end.

    Raises:
        JobFailedError: they cannot be created or written; the message names TMPDIR, which sets their folder.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(scratch_file()) for _ in range(count)]
        videos = [RawVideo(file.path, request.width, request.height) for file in files]
        yield RawSet(videos, [RawFrames(file) for file in files])


def check_room(request: VideoRequest, count: int) -> None:
    """Refuse a comparison for which there is no room on disk.

    Args:
        request: a request of the videos' size.
        count: number of raw videos that exist at the same time.

    Raises:
        BadRequestError: there is too little room, or no folder for temporary files.
    """
    needed = count * request.frames * request.height * request.width * 3
    try:
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise BadRequestError(f"compare: temporary files: {reason(error)} ({REMEDY})") from None
    if free < needed:
        raise BadRequestError(
            f"compare: {needed / 1e6:.1f} MB of raw frames do not fit in {folder!r}, where "
            f"{free / 1e6:.1f} MB are free ({REMEDY})"
        )
