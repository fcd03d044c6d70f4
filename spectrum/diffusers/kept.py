"""Kept: the file that keeps a calibration's finished runs over an interruption, and how files are written."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spectrum.calibration import SCHEMA, Findings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@dataclass(slots=True)
class Runs:
    """Finished runs.

    Attributes:
        found: what was found.
        pictures: pictures of the full runs.
        told: conditions and noise levels that a generation tells.
    """

    found: Findings
    pictures: list[NDArray[np.uint8]]
    told: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kept:
    """File of finished runs of one calibration.

    Attributes:
        path: path of the file.
        identity: digest of everything that the runs depend on.
    """

    path: Path
    identity: str

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from making the same file.

        Raises:
            ValueError: one is making it.
        """
        lock = self.path.with_name(self.path.name + ".lock")
        with _locked(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def read(self, *, overwrite: bool) -> Runs | None:
        """Read the finished runs; None if there are none, or, with `overwrite`, none of this calibration.

        Raises:
            ValueError: the file is of another calibration, or is damaged or none.
        """
        if not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, weights_only=True)
            of_this = kept["identity"] == [SCHEMA, self.identity]
            if of_this:
                plain = json.loads(kept["found"])
                pictures = [one.numpy() for one in kept["pictures"]]
                return Runs(Findings(**plain["found"], latents=kept["latents"]), pictures, plain["told"])
            problem = "holds finished runs of another calibration (other prompts, arguments or weights)"
        except Exception as error:  # torch raises anything for other files
            told, *_ = str(error).splitlines() or [""]
            problem = f"cannot be read as finished runs ({type(error).__name__}: {told[:200]})"
        if overwrite:
            return None
        raise ValueError(f"out: {str(self.path)!r} {problem}; move it, or overwrite=True starts again")

    def write(self, runs: Runs) -> None:
        """Write the finished runs.

        Raises:
            OSError: they cannot be written; those written before stay.
        """
        found = json.dumps({"told": runs.told, "found": runs.found.plain()})
        pictures = [torch.from_numpy(one) for one in runs.pictures]
        content = {"identity": [SCHEMA, self.identity], "found": found, "latents": runs.found.latents}
        buffer = io.BytesIO()
        torch.save(content | {"pictures": pictures}, buffer)
        write_whole(self.path, buffer.getvalue())

    def remove(self) -> None:
        """Remove the file, as the calibration is done."""
        self.path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock, which ends with the process."""
    while True:
        with path.open("w") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"out: another process is making this calibration (it holds {str(path)!r}); wait for it, "
                    f"or give another name"
                ) from None
            if _is(path, file.fileno()):
                yield
                return


def _is(path: Path, descriptor: int) -> bool:
    """Whether the file at `path` is the one that is open; another process may have removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
