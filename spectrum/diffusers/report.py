"""Report of the latest generation of one transformer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Report:
    """What was computed and what was forecast in the latest generation of one transformer.

    Steps are indices in the sampler's list of timesteps, from 0. A generation that starts later (from an
    image, or as the second of two experts) begins with a later one.

    Attributes:
        preset: name of the preset.
        stream: forecast quantity, `feature` or `velocity`.
        steps: number of steps that the generation was to have on this transformer; 0 if there was none.
        computed: steps that the schedule had computed.
        forecast: steps that it had forecast.
        evaluations: calls of the transformer in which its blocks ran.
        forecasts: calls of the transformer that were forecast.
        restarts: histories given up in the middle, because a call did not continue the ones before it.
        unknown: calls by pipelines that were never passed to `enable`; they are always computed. They are
            counted since it was called.
        errors: step → relative error that the forecast of a computed step would have had.
        bytes: most memory that the history took, in bytes.
    """

    preset: str
    stream: str
    steps: int = 0
    computed: tuple[int, ...] = ()
    forecast: tuple[int, ...] = ()
    evaluations: int = 0
    forecasts: int = 0
    restarts: int = 0
    unknown: int = 0
    errors: dict[int, float] = field(default_factory=dict)
    bytes: int = 0

    @property
    def nfe(self) -> int:
        """Computed transformer evaluations per branch."""
        return len(self.computed)
