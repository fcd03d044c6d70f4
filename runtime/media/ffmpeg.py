"""ffmpeg as a child process: paths are always files, failures have a reason, and it ends with its parent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import imageio_ffmpeg

from runtime.errors import JobFailedError, with_files

ALIVE = ("-progress", "pipe:1", "-stats_period", "5")  # it reports its progress, and so that it is alive
SILENCE = 600.0  # seconds without a sign of life, after which it is killed
_REMEMBERED, _TOLD = 40, 5  # lines of its output that are kept, and that are put into an error
_READ = 1 << 20  # bytes
# Linux kills it with the thread that started it, so that a killed job leaves none behind.
_BOUND = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)


def file_url(path: Path) -> str:
    """Write `path` for ffmpeg, so that no name is taken for an option or another protocol."""
    return f"file:{path}"


class Ffmpeg:
    """A running ffmpeg; at the end of the block it has ended, or is killed.

    Args:
        arguments: arguments besides the common ones; paths as `file_url`.
        doing: completes "ffmpeg could not …".
        loglevel: level of its output, which goes into errors and to `said`.
        folder: its working directory.
        silence: limit in seconds for a time without reading, writing or ending.

    Raises:
        JobFailedError: ffmpeg could not be started.
    """

    def __init__(
        self,
        *arguments: str,
        doing: str,
        loglevel: str = "error",
        folder: Path | None = None,
        silence: float = SILENCE,
    ):
        self._doing, self._silence = doing, silence
        program = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostats", "-y", "-nostdin"]
        command = [*program, "-loglevel", loglevel, *arguments]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, start_new_session=True
            )
        except OSError as error:
            raise JobFailedError(
                f"ffmpeg could not {doing}: it could not be started: {with_files(error)}"
            ) from None
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin, self._stdout, self._stderr = (
            self._process.stdin, self._process.stdout, self._process.stderr,
        )  # fmt: skip
        os.set_blocking(self._stdin.fileno(), False)
        self._lines: deque[str] = deque(maxlen=_REMEMBERED)
        self._listener = threading.Thread(target=self._listen, name="ffmpeg", daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._stdin, self._stdout, self._stderr):
            with suppress(BrokenPipeError):
                pipe.close()

    @property
    def said(self) -> str:
        """Last lines of its output, once it has ended."""
        return "\n".join(self._lines)

    def write(self, data: memoryview) -> None:
        """Write to its standard input.

        Args:
            data: a view of bytes.

        Raises:
            JobFailedError: it has ended, or reads no more.
        """
        while data:
            self._await(self._stdin.fileno(), select.POLLOUT)
            try:
                data = data[os.write(self._stdin.fileno(), data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self.finish()  # raises with ffmpeg's own words
                raise self._failed("it did not read all of its input") from None

    def read(self, most: int = _READ) -> bytes:
        """Read from its standard output; return an empty result at the end.

        Raises:
            JobFailedError: it neither writes nor ends.
        """
        self._await(self._stdout.fileno(), select.POLLIN)
        return os.read(self._stdout.fileno(), most)

    def finish(self) -> bytes:
        """Wait for its end; return the rest of its standard output.

        Raises:
            JobFailedError: it failed; the message has the last lines of its output.
        """
        with suppress(BrokenPipeError):
            self._stdin.close()
        rest = b"".join(iter(self.read, b""))
        try:
            code = self._process.wait(self._silence)
        except subprocess.TimeoutExpired:
            raise self._stalled() from None
        self._listener.join()
        if code < 0:
            raise self._failed(f"killed by {signal.Signals(-code).name}")
        if code > 0:
            raise self._failed(f"exit {code}")
        return rest

    def _listen(self) -> None:
        for line in self._stderr:
            self._lines.append(line.decode(errors="replace").rstrip())

    def _await(self, descriptor: int, event: int) -> None:
        ready = select.poll()
        ready.register(descriptor, event)
        if not ready.poll(1000 * self._silence):
            raise self._stalled()

    def _stalled(self) -> JobFailedError:
        return self._failed(f"it did nothing for {self._silence:.0f} s")

    def _failed(self, how: str) -> JobFailedError:
        said = " / ".join(list(self._lines)[-_TOLD:])
        return JobFailedError(f"ffmpeg could not {self._doing} ({how}){said and ': '}{said}")


def run_ffmpeg(*arguments: str, doing: str, loglevel: str = "error", folder: Path | None = None) -> str:
    """Run ffmpeg, and return the last lines of its output.

    Raises:
        JobFailedError: it failed, or made no progress.
    """
    with Ffmpeg(*ALIVE, *arguments, doing=doing, loglevel=loglevel, folder=folder) as ffmpeg:
        ffmpeg.finish()
    return ffmpeg.said
