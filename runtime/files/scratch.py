"""Temporary files without a name: whatever ends the process, nothing of them is left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import JobFailedError
from runtime.files.atomic import PlainFile
from runtime.files.checks import reason

REMEDY = "TMPDIR names another folder"


class ScratchFile(PlainFile):
    """A file in the folder of temporary files that only this process and its children can find."""

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="lockstep-")
        self._folder = str(Path(name).parent)
        Path(name).unlink()
        super().__init__(descriptor, "w")

    @property
    def path(self) -> Path:
        """For as long as it is open; children may use it, too."""
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
    """A new one.

    Raises:
        JobFailedError: it cannot be made; as in `write`, the message names TMPDIR, which says where it is.
    """
    try:
        file = ScratchFile()
    except OSError as error:
        raise JobFailedError(f"temporary files: {reason(error)} ({REMEDY})") from error
    with file:
        yield file
