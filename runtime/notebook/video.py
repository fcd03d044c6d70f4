"""A video in memory.

Tensor legend: T frames, H, W height and width in pixels. Frames are uint8 RGB.
"""

from __future__ import annotations

import base64
import tempfile
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from runtime.files.checks import check_suffix, check_writable
from runtime.files.kinds import VIDEO
from runtime.files.text import user_path
from runtime.media.mp4 import Frames, mp4_writer
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result


@dataclass(frozen=True, slots=True)
class Video:
    """A video that a model has made; a notebook shows it.

    Attributes:
        frames: its frames, uint8 `[T, H, W, 3]`, RGB.
        fps: frames per second.
        request: what was asked for.
        warnings: sentences about what may have unintended effects.
    """

    frames: Frames = field(repr=False)
    fps: int
    request: VideoRequest
    warnings: list[str]
    _result: Result = field(repr=False)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self._result.steps)

    @property
    def nfe(self) -> int:
        """Number of computed steps."""
        return self._result.nfe

    @property
    def computed(self) -> list[int]:
        """Numbers of the computed steps, from 0."""
        return self._result.computed["cond"]

    @property
    def seconds(self) -> float:
        """What denoising took."""
        return self._result.seconds.denoise

    @property
    def psnr(self) -> float | None:
        """Expected PSNR in dB against the full sampler, as the calibration predicts; None without one."""
        return self._result.expectation.psnr

    def images(self) -> list[Image.Image]:
        """Its frames as images of Pillow."""
        return [Image.fromarray(frame) for frame in self.frames]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as an mp4, and return the file's path.

        Args:
            overwrite: whether an mp4 of this name may be replaced.

        Raises:
            BadRequestError: the file cannot be written.
            JobFailedError: ffmpeg failed, for example as the disk is full.
        """
        path = user_path(str(path))
        check_suffix(path, ".mp4", field="path")
        check_writable(path, overwrite=overwrite, field="path", kind=VIDEO)
        self._write(path)
        return path

    def _write(self, path: Path) -> None:
        height, width = self.frames.shape[1:3]
        with mp4_writer(path, width=width, height=height, fps=self.fps) as sink:
            sink.write(self.frames)

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        with tempfile.TemporaryDirectory(prefix="lockstep-") as folder:
            path = Path(folder) / "video.mp4"
            self._write(path)
            content = base64.b64encode(path.read_bytes()).decode()
        source = f"data:video/mp4;base64,{content}"
        return f'<video controls loop src="{source}" title="{escape(self.request.prompt)}"></video>'
