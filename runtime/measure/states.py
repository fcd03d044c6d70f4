"""Files of a calibration's states: what solvers are fitted to, on disk, so that memory stays bounded.

Tensor legend: C, F, H, W latent channels, frames, height and width.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.errors import BadRequestError, JobFailedError, reason
from runtime.files.atomic import whole_file

_NUMBER = 4  # bytes of a float32
_VALUES, _STATES = "values.f32", re.compile(r"[0-9a-f]{16}-[0-9]+\.f32")


@dataclass(frozen=True, slots=True)
class StateFiles:
    """States of full runs, one file of float32 for each video, and room for the values of a fit.

    Attributes:
        folder: folder of the files, which is made when it is needed.
        identity: identity of the calibration; files of another one are not used.
        shape: shape of a video's latents.
        steps: number of sampler steps n.
    """

    folder: Path
    identity: str
    shape: Sequence[int]
    steps: int

    @property
    def size(self) -> int:
        """Bytes of one video's states."""
        return (self.steps + 1) * math.prod(self.shape) * _NUMBER

    def has(self, video: int) -> bool:
        """Return whether all states of a video are there."""
        path = self._path(video)
        return path.is_file() and path.stat().st_size == self.size

    @contextmanager
    def writing(self, video: int) -> Iterator[Callable[[torch.Tensor], None]]:
        """Yield what writes one state after another; the file appears when all are written.

        Raises:
            JobFailedError: the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self._path(video)) as temporary, temporary.open("wb") as file:

            def write(state_BCFHW: torch.Tensor) -> None:
                file.write(state_BCFHW.float().cpu().contiguous().numpy().tobytes())

            yield write

    def state(self, video: int, step: int) -> torch.Tensor:
        """State before a step, or the result for step n: float32 in host memory, read when it is used."""
        numbers = math.prod(self.shape)
        states = torch.from_file(
            str(self._path(video)), shared=True, size=(self.steps + 1) * numbers, dtype=torch.float32
        )
        return states[step * numbers : (step + 1) * numbers].view(*self.shape)

    @contextmanager
    def room(self, count: int) -> Iterator[torch.Tensor]:
        """Yield a tensor `[count, …]` for as many latents, whose pages the system may move to disk.

        Raises:
            JobFailedError: the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, numbers = self.folder / _VALUES, count * math.prod(self.shape)
        try:
            _reserve(path, numbers * _NUMBER)
            values = torch.from_file(str(path), shared=True, size=numbers, dtype=torch.float32)
            yield values.view(count, *self.shape)
        finally:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the files, also of another calibration, and their folder if there is nothing else in it."""
        for path in self.folder.glob("*.f32"):
            if path.name == _VALUES or _STATES.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, video: int) -> Path:
        return self.folder / f"{self.identity[:16]}-{video}.f32"


def states_beside(partial: Path) -> Path:
    """Folder of the states of an unfinished calibration, beside its file of finished runs."""
    return partial.with_name(f"{partial.name}.states")


def check_states(folder: Path) -> None:
    """Refuse a folder of states whose name is in use by something else, before anything runs.

    Raises:
        BadRequestError: it is not a folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise BadRequestError(
            f"out: {str(folder)!r} is not a folder, but the states of runs are stored in a folder of this "
            "name; move the file, or give another name"
        )


def _reserve(path: Path, size: int) -> None:
    """Make a file with all its room on disk: a mapped page that has none would end the process."""
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise JobFailedError(f"cannot write {str(path)!r}: {reason(error)}") from error
