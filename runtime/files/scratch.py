"""Temporary files without a name: nothing is left of them, however the process ends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import JobFailedError, reason
from runtime.files.atomic import PlainFile

REMEDY = "set TMPDIR to use another folder"


class ScratchFile(PlainFile):
    """An unnamed file in the temporary folder, which only this process and its children can open."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="lockstep-")
        self._folder = str(Path(name).parent)
        Path(name).unlink()
        super().__init__(descriptor, "w")

    @property
    def path(self) -> Path:
        """Path of the file while it is open; valid in child processes, too."""
        return Path(f"/proc/{os.getpid()}/fd/{self.fileno()}")

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            raise JobFailedError(
                f"temporary files: cannot write in {self._folder!r}: {reason(error)} ({REMEDY})"
            ) from error


@contextmanager
def scratch_file() -> Iterator[ScratchFile]:
    """Open a new scratch file.

    Raises:
        JobFailedError: it cannot be created; as in `write`, the message names TMPDIR, which sets its folder.
    """
    try:
        file = ScratchFile()
    except OSError as error:
        raise JobFailedError(f"temporary files: {reason(error)} ({REMEDY})") from error
    with file:
        yield file
