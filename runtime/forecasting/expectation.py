"""Expected quality of a generation, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Expectation:
    """Expected quality of the result, from the calibration and the measured forecast errors.

    Attributes:
        psnr: expected PSNR against the full sampler, dB; None without a calibration for it.
        deviation: one standard deviation of that PSNR over the calibration's videos, dB.
        errors: step → expected relative error of a forecast, also at computed steps, which need none.
        added: steps computed beyond the plan, because forecasts were worse than planned.
        dropped: steps of the schedule for which there was no time.
        handed_over: first step at which a fitted solver was left, and the sampler went on with forecasts;
            None if there was no solver, or it was followed to the end.
        note: what is to be known where nothing is expected; empty otherwise.
    """

    psnr: float | None = None
    deviation: float | None = None
    errors: dict[int, float] = field(default_factory=dict)
    added: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    handed_over: int | None = None
    note: str = ""
