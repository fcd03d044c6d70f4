"""Windows: the parts of a long video that a model sees at a time.

Source: MultiDiffusion (Bar-Tal et al., 2023), along time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one length that cover a video; the last one overlaps more if the length does not fit.

    Attributes:
        total: latent frames of the video.
        length: latent frames of a window.
        starts: first frame of each window, ascending.
    """

    total: int
    length: int
    starts: tuple[int, ...]

    @classmethod
    def over(cls, total: int, length: int, overlap: int) -> Windows:
        """Cover `total` frames with the fewest windows whose neighbours share at least `overlap` frames.

        Raises:
            ValueError: the overlap is not within 1 … length − 1.
        """
        if not 1 <= overlap < length:
            raise ValueError(f"windows of {length} frames overlap in 1 to {length - 1}, got {overlap}")
        if total <= length:
            return cls(total, total, (0,))
        stride = length - overlap
        count = -(-(total - length) // stride) + 1
        last = total - length
        return cls(total, length, tuple(min(number * stride, last) for number in range(count)))

    def after(self, frames: int) -> Windows:
        """The same windows of a video that has `frames` more frames at its beginning; none sees those."""
        return replace(self, total=self.total + frames, starts=tuple(frames + start for start in self.starts))

    def __len__(self) -> int:
        return len(self.starts)

    def slice(self, number: int) -> slice:
        """Frames of window `number`."""
        return slice(self.starts[number], self.starts[number] + self.length)

    def weights(self) -> list[torch.Tensor]:
        """Weights of each window's frames, `[length]`: smooth, with sum 1 at every frame of the video."""
        ramps = torch.zeros(len(self), self.total, dtype=torch.float64)
        for number, start in enumerate(self.starts):
            own = ramps[number, self.slice(number)]
            own += 1.0
            if number > 0:
                rising = self.starts[number - 1] + self.length - start
                own[:rising] *= _ramp(rising)
            if number + 1 < len(self):
                falling = start + self.length - self.starts[number + 1]
                own[-falling:] *= _ramp(falling).flip(0)
        shares = ramps / ramps.sum(0)
        return [shares[number, self.slice(number)].float() for number in range(len(self))]


def _ramp(length: int) -> torch.Tensor:
    """Smooth ramp from 0 to 1, `[length]`, which adds up to 1 with its mirror image."""
    middles = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.sin(middles * (math.pi / 2)).square()
