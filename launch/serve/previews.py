"""Previews of the requests that are running: one file each, in the folder `previews` of their queue."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import BadRequestError
from runtime.media.preview import PreviewFile
from runtime.request.outputs import is_preview

_NAME = re.compile(r"[0-9]+\.webp")


class RequestPreviews:
    """The previews of the queue in `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder.absolute() / "previews"

    def of(self, request: int) -> PreviewFile:
        """The preview of the request with this number."""
        return PreviewFile(self._folder / f"{request}.webp")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Remove previews that a killed pool has left before the block, and the folder after it, if empty."""
        self._clear()
        try:
            yield
        finally:
            with suppress(OSError):
                self._folder.rmdir()

    def _clear(self) -> None:
        with suppress(OSError):
            for path in [path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)]:
                with suppress(OSError, BadRequestError):  # another user's
                    if path.is_file() and is_preview(path):
                        path.unlink()
