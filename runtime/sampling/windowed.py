"""Videos longer than the model's window: overlapping windows, denoised together.

At every step each window of latent frames is evaluated as if it were a whole video, and the velocities are
blended where windows overlap. So neighbours agree on the frames they share at every step, there are no joins
to decode and encode again, and activations take the memory of one window, whatever the length.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
Source: MultiDiffusion (Bar-Tal et al., 2023), along time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.sampling.streams import History, Kinds, Stream, StreamOutput
from spectrum import Squares


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one length that cover a video; the last one overlaps more where the length does not fit.

    Attributes:
        total: latent frames of the video.
        length: of a window.
        starts: ascending.
    """

    total: int
    length: int
    starts: tuple[int, ...]

    @classmethod
    def over(cls, total: int, length: int, overlap: int) -> Windows:
        """As few windows as cover `total` frames with neighbours that share at least `overlap`.

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

    def __len__(self) -> int:
        return len(self.starts)

    def slice(self, number: int) -> slice:
        """Frames of a window."""
        return slice(self.starts[number], self.starts[number] + self.length)

    def weights(self) -> list[torch.Tensor]:
        """Of each window's frames, `[length]`: smooth, and adding up to 1 at every frame of the video."""
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


class WindowedStream:
    """Each window has a stream of its own, with its own forecasters; all follow the same decisions.

    Args:
        streams: one for each window.
        windows: where they lie.
    """

    def __init__(self, streams: Sequence[Stream], windows: Windows):
        self._streams, self._windows = list(streams), windows
        self._weights = windows.weights()

    @property
    def bytes(self) -> int:
        return sum(stream.bytes for stream in self._streams)

    @property
    def kept(self) -> int:
        return max(stream.kept for stream in self._streams)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{number}/{name}" for number, one in enumerate(self._streams) for name in one.names)

    def advance(
        self, step: int, kinds: Kinds, latents_BCFHW: torch.Tensor, timestep_B: torch.Tensor
    ) -> StreamOutput:
        blended_BCFHW: torch.Tensor | None = None
        squares: list[Squares] = []
        parts: dict[str, torch.Tensor] = {}
        if self._weights[0].device != latents_BCFHW.device:  # once: copies to a device wait for it
            self._weights = [share.to(latents_BCFHW.device) for share in self._weights]
        for number, (stream, share) in enumerate(zip(self._streams, self._weights, strict=True)):
            own = self._windows.slice(number)
            output = stream.advance(step, kinds, latents_BCFHW[:, :, own].contiguous(), timestep_B)
            if blended_BCFHW is None:
                blended_BCFHW = torch.zeros_like(latents_BCFHW, dtype=torch.float32)
            blended_BCFHW[:, :, own] += share.view(-1, 1, 1) * output.velocity_BCFHW
            squares += [output.squares] if output.squares is not None else []
            parts |= {f"{name} of window {number + 1}": part for name, part in output.parts.items()}
        assert blended_BCFHW is not None
        return StreamOutput(blended_BCFHW, Squares.total(squares) if squares else None, parts)

    def history(self) -> History:
        return _joined([stream.history() for stream in self._streams])

    def whole(self) -> History:
        return _joined([stream.whole() for stream in self._streams])

    def restore(self, history: History, whole: History, *, sharded: bool) -> None:
        for number, stream in enumerate(self._streams):
            stream.restore(_of(history, number), _of(whole, number), sharded=sharded)


def _ramp(length: int) -> torch.Tensor:
    """From 0 to 1, smooth; with its mirror image it adds up to 1."""
    middles = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return torch.sin(middles * (math.pi / 2)).square()


def _joined(histories: list[History]) -> History:
    return {
        f"{number}/{name}": values for number, one in enumerate(histories) for name, values in one.items()
    }


def _of(history: History, number: int) -> History:
    prefix = f"{number}/"
    return {name.removeprefix(prefix): v for name, v in history.items() if name.startswith(prefix)}
