"""What a caller is told of each step, and how the run is stopped from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from runtime.sampling.denoise import OnStep, StepRecord
from spectrum import StepKind


@dataclass(frozen=True, slots=True)
class Step:
    """A step that is done.

    Attributes:
        number: its number within its video, from 1.
        steps: number of steps of that video.
        kind: `compute` or `forecast`.
        seconds: what it took.
        label: the video's preset and seed, or the part of a calibration.
        progress: how much of the whole call is done, from 0 to 1.
    """

    number: int
    steps: int
    kind: StepKind
    seconds: float
    label: str
    progress: float
    _stop: Callable[[], object] = field(repr=False, compare=False)

    def stop(self) -> None:
        """End the run within two steps, which raises `CancelledError`; the last steps are finished.

        With checkpoints the state is kept.
        """
        self._stop()


OnVideoStep = Callable[[Step], object]
"""Called with each step that is done; what it returns is ignored, what it raises ends the run."""


def unseen(step: Step) -> None:
    """Show no progress."""


class Telling:
    """Progress of several generations, one after another, for the function of a caller.

    Args:
        on_step: the function.
        stop: ends the run.
        generations: how many there will be.
    """

    def __init__(self, on_step: OnVideoStep, stop: Callable[[], object], generations: int = 1):
        self._on_step, self._stop, self._generations, self._ended = on_step, stop, generations, 0

    @contextmanager
    def __call__(self, label: str, kinds: Sequence[StepKind]) -> Iterator[OnStep]:
        """Tell of one generation; see `runtime.jobs.run.Progress`."""
        steps = len(kinds)

        def told(record: StepRecord) -> None:
            number = record.index + 1
            progress = (self._ended + number / steps) / self._generations
            self._on_step(Step(number, steps, record.kind, record.seconds, label, progress, self._stop))

        yield told
        self._ended += 1
