"""What is expected of a generation, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Expectation:
    """How good the result should be, going by the calibration and the errors that were seen.

    Attributes:
        psnr: against the full sampler, dB; None where nothing was calibrated for it.
        deviation: of that PSNR, dB: one standard deviation over the calibration's videos.
        errors: step → expected relative error of its forecast; at computed steps, of the one not needed.
        added: steps computed beyond the plan, as forecasts were worse than it allows.
        dropped: steps of the schedule that there was no time for.
    """

    psnr: float | None = None
    deviation: float | None = None
    errors: dict[int, float] = field(default_factory=dict)
    added: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
