"""Files that can be made again, kept in the user's cache folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from runtime.errors import JobFailedError
from runtime.files.atomic import whole_file
from runtime.files.text import user_path

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Folder `lockstep` in the user's cache folder: `XDG_CACHE_HOME`, or `~/.cache`."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else user_path("~/.cache")) / "lockstep"


class CachedFile:
    """A small text file in the cache folder.

    Nothing depends on it: a file that cannot be read counts as missing, and one that cannot be written is a
    warning.

    Args:
        name: path of the file within the folder; what it was made from is part of it.
    """

    def __init__(self, name: str):
        self.path = cache_folder() / name

    def read(self) -> str | None:
        """Return its text; None if there is none."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def write(self, text: str) -> None:
        """Replace it, whole or not at all."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except (OSError, JobFailedError) as error:
            log.warning("%s is made again next time: %s", self.path.name, error)
