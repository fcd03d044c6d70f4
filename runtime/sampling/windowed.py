"""Videos longer than the model's window: overlapping windows, denoised together.

At every step each window of latent frames is evaluated as if it were a whole video, and the velocities are
blended where windows overlap. Neighbours therefore agree on shared frames at every step, nothing is decoded
and encoded again at joints, and activations take the memory of one window, regardless of the length.

Tensor legend: B batch, C latent channels, F latent frames, H, W latent height and width.
Source: MultiDiffusion (Bar-Tal et al., 2023), along time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.checkpoint.history import History
from runtime.request.windows import Windows
from runtime.sampling.blending import Blender
from runtime.sampling.network import StreamOutput
from runtime.sampling.streams import Kinds, Stream
from spectrum import Squares


class WindowedStream:
    """A stream of overlapping windows, each with a stream and forecasters of its own, under shared decisions.

    Args:
        streams: one stream for each window.
        windows: the windows' places in the video.
    """

    def __init__(self, streams: Sequence[Stream], windows: Windows):
        self._streams, self._windows = list(streams), windows
        self._blender = Blender(windows)

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
        for number, stream in enumerate(self._streams):
            own = self._windows.slice(number)
            output = stream.advance(step, kinds, latents_BCFHW[:, :, own].contiguous(), timestep_B)
            if blended_BCFHW is None:
                blended_BCFHW = torch.zeros_like(latents_BCFHW, dtype=torch.float32)
            self._blender.add(number, output.velocity_BCFHW, blended_BCFHW)
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


def _joined(histories: list[History]) -> History:
    return {
        f"{number}/{name}": values for number, one in enumerate(histories) for name, values in one.items()
    }


def _of(history: History, number: int) -> History:
    prefix = f"{number}/"
    return {name.removeprefix(prefix): v for name, v in history.items() if name.startswith(prefix)}
