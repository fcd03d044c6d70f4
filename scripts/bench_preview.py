"""What previews cost: on wan-tiny here, and at the shapes of a 14B model by counting.

    python scripts/bench_preview.py

First wan-tiny makes a video without previews, and one with a preview after every computed step, many more
than the one a second that a user gets: the time that a preview takes of denoising, that of its encoding,
which is done in a thread, and whether the frames are the same. Then the shapes of Wan2.1 14B at 720p:
operations and bytes of a preview against those of a computed step, and the processor time of both halves on
this machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer, Frames, to_uint8
from runtime.media.preview import encode_preview
from runtime.models.colours import LatentColours
from runtime.request.config import load_config
from runtime.sampling.estimate import Estimate
from runtime.sampling.result import Result

PROMPT = "a red circle moving left on a black background"


@dataclass(slots=True)
class EveryStep:
    """Sink that takes every preview, to be encoded later."""

    due: bool = True
    shown: list[tuple[Frames, float]] = field(default_factory=list)

    def show(self, frames_BTHW3: Frames, seconds: float) -> None:
        self.shown.append((frames_BTHW3, seconds))


@dataclass(frozen=True, slots=True)
class Shape:
    """A model and a video: what a computed step of both guidance branches, and a preview, take.

    Attributes:
        latents: C, F, H, W.
        dim, ffn, layers, text: width, width between, blocks, text tokens.
    """

    latents: tuple[int, int, int, int] = (16, 21, 90, 160)
    dim: int = 5120
    ffn: int = 13824
    layers: int = 40
    text: int = 512

    @property
    def step_flop(self) -> float:
        """Of matrix products: 2 for each multiplication and addition."""
        _, frames, height, width = self.latents
        tokens = frames * (height // 2) * (width // 2)
        linear = 2 * tokens * (6 * self.dim**2 + 2 * self.dim * self.ffn) + 4 * self.text * self.dim**2
        attention = 4 * tokens * (tokens + self.text) * self.dim
        return 2.0 * self.layers * (linear + attention)

    @property
    def preview_flop(self) -> float:
        """Of x₀ and of the map."""
        channels, *places = self.latents
        count = places[0] * places[1] * places[2]
        return 2.0 * channels * count + 2.0 * channels * count * 3

    @property
    def read_bytes(self) -> int:
        """Read and written on the device: latents and velocity in float32, the estimate and its colours."""
        channels, *places = self.latents
        count = places[0] * places[1] * places[2]
        return 4 * count * (3 * channels + channels + 2 * 3) + count * 3

    @property
    def host_bytes(self) -> int:
        """Sent to the host."""
        return 3 * self.latents[1] * self.latents[2] * self.latents[3]


def generate(engine: Engine, sink: EveryStep | None, steps: int) -> Result:
    with engine.previewed(sink):
        return engine.generate(
            engine.config.request(PROMPT, seed=1, steps=steps, spectrum="off"), [FrameBuffer()]
        )


def best(work: Callable[[], object], times: int = 7) -> float:
    """The shortest processor time of several tries, in milliseconds."""
    taken = []
    for _ in range(times):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return 1000 * min(taken)


def measure_tiny(steps: int) -> None:
    engine, sink = Engine(load_config("wan-tiny")), EveryStep()
    generate(engine, sink, 1)  # fits the map
    plain, shown = generate(engine, None, steps), generate(engine, sink, steps)
    step = 1000 * statistics.median(one.seconds for one in plain.steps)
    taken = 1000 * statistics.median(shown.preview_seconds or [])
    encoding = best(lambda: encode_preview(*sink.shown[-1]))
    size = len(encode_preview(*sink.shown[-1]))
    same = "the same" if plain.frames_sha256 == shown.frames_sha256 else "DIFFERENT"
    print(
        f"wan-tiny 96x96, 17 frames: computed step {step:.0f} ms, a preview {taken:.2f} ms of it "
        f"({100 * taken / step:.2f} %); in its thread {encoding:.1f} ms; {size} bytes; frames {same}"
    )


def measure_shape(shape: Shape) -> None:
    numbers = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(1, *shape.latents, generator=numbers) for _ in range(2))
    colours = LatentColours(0.05 * torch.randn(shape.latents[0], 3, generator=numbers), torch.full((3,), 0.5))
    estimate = Estimate(latents, velocity, 0.7)
    small = to_uint8(colours.rgb(estimate.clean()))
    mapped = best(lambda: to_uint8(colours.rgb(estimate.clean())))
    blurred = np.repeat(np.repeat(small[:, :, ::10, ::10], 10, axis=2), 10, axis=3)
    encoded, most = (best(partial(encode_preview, one, 0.25)) for one in (blurred, small))
    print(
        f"14B 1280x720, 81 frames: computed step {shape.step_flop / 1e15:.2f} PFLOP; preview "
        f"{shape.preview_flop / 1e9:.3f} GFLOP ({shape.preview_flop / shape.step_flop:.0e} of it), "
        f"{shape.read_bytes / 1e6:.0f} MB on the device, {shape.host_bytes / 1e6:.1f} MB to the host"
    )
    print(
        f"  on one core: estimate and map {mapped:.0f} ms; in its thread {encoded:.0f} ms for areas of one "
        f"colour, {len(encode_preview(blurred, 0.25)) / 1000:.0f} kB, and {most:.0f} ms for noise, "
        f"{len(encode_preview(small, 0.25)) / 1000:.0f} kB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of wan-tiny's video")
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure_tiny(given.steps)
    measure_shape(Shape())


if __name__ == "__main__":
    main()
