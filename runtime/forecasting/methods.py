"""Methods of skipping steps side by side: what each is expected to give for a number of computed steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.errors import BadRequestError
from runtime.forecasting.calibration import Calibration
from spectrum import PlannedSteps, StepSeconds
from spectrum.calibration import Prediction, tail

Method = Literal["planned", "fitted"]
_TENTH = 1.2816  # deviations below the mean of a normal distribution's 10th percentile


@dataclass(frozen=True, slots=True)
class Choice:
    """One method for one number of computed steps.

    Attributes:
        method: `planned` forecasts for the sampler, or a `fitted` solver.
        plan: computed steps, and expected errors of forecasts.
        prediction: expected PSNR; None with too few trials.
        tail: PSNR, dB, that nine of ten videos exceed: of trials, or as the prediction's deviation says.
    """

    method: Method
    plan: PlannedSteps
    prediction: Prediction | None
    tail: float | None

    @property
    def score(self) -> float:
        """Grade by mean and tail, dB; the lowest of all if nothing is known."""
        if self.prediction is None or self.tail is None:
            return float("-inf")
        return (self.prediction.psnr + self.tail) / 2.0

    @property
    def preset(self) -> dict[str, object]:
        """Content of a preset that does this, but for the calibration."""
        return {
            "stream": "guided",
            "schedule": {"kind": self.method, "nfe": self.plan.nfe},
            "predictor": {"kind": "calibrated"},
        }


class Methods:
    """Methods that a calibration offers, for the guided stream."""

    def __init__(self, calibration: Calibration):
        self._calibration, self._planner = calibration, calibration.planner("guided")

    def planned(self, nfe: int) -> Choice:
        """Planned forecasts.

        Raises:
            BadRequestError: `nfe` is not a possible number of steps.
        """
        try:
            plan = self._planner.plan(nfe)
        except ValueError as error:
            raise BadRequestError(f"nfe: {nfe} given; {error}") from None
        prediction = self._calibration.predict(plan.error)
        low = tail([trial for trial in self._calibration.trials if trial.nfe == nfe])
        if low is None and prediction is not None:
            low = prediction.psnr - _TENTH * prediction.deviation
        return Choice("planned", plan, prediction, low)

    def fitted(self, nfe: int) -> Choice | None:
        """A fitted solver; None if there is none for `nfe` steps."""
        for fit in self._calibration.fits:
            if fit.nfe == nfe:
                plan = fit.fitted.steps(self._calibration.conditions.steps)
                return Choice("fitted", plan, fit.predict(), fit.tail)
        return None

    def all(self, nfe: int) -> list[Choice]:
        """All methods for `nfe` computed steps."""
        fitted = self.fitted(nfe)
        return [self.planned(nfe), *([] if fitted is None else [fitted])]

    def best(self, nfe: int, method: Method | None = None) -> Choice:
        """The method with the best mean and tail for `nfe` steps, or the one that is asked for.

        Raises:
            BadRequestError: it does not have that number of steps.
        """
        if method == "fitted":
            self._calibration.fit(nfe)  # says which there are
        found = [one for one in self.all(nfe) if method in (None, one.method)]
        return max(found, key=lambda one: one.score)

    def for_psnr(self, target: float, method: Method | None = None) -> Choice:
        """The fewest computed steps with an expected PSNR of at least `target`.

        Raises:
            BadRequestError: nothing reaches it, or there are too few trials to predict the PSNR.
        """
        highest = 0.0
        for nfe in range(1, self._calibration.conditions.steps):
            told = [one for one in self.all(nfe) if method in (None, one.method)]
            known = [one for one in told if one.prediction is not None]
            if told and not known:
                trials = len(self._calibration.trials)
                raise BadRequestError(
                    f"psnr: this calibration has {trials} trials, too few to predict the PSNR"
                )
            reached = [one for one in known if one.prediction and one.prediction.psnr >= target]
            if reached:
                return max(reached, key=lambda one: one.score)
            highest = max([highest, *(one.prediction.psnr for one in known if one.prediction)])
        raise BadRequestError(f"psnr: {target:g} given; the best predicted value is {highest:.1f} dB")

    def for_seconds(
        self, seconds: float, typical: StepSeconds | None = None, method: Method | None = None
    ) -> Choice:
        """The best of what can be denoised within `seconds`.

        Args:
            typical: seconds of the steps; by default those of the calibration's own machine.

        Raises:
            BadRequestError: even a single computed step takes longer, or no solver is that quick.
        """
        most = self._calibration.affordable(seconds, typical)
        solvers = [fit.nfe for fit in self._calibration.fits if fit.nfe <= most]
        found = [one for nfe in solvers[-1:] if (one := self.fitted(nfe)) is not None]
        if method != "fitted":
            found = [self.planned(most), *([] if method == "planned" else found)]
        if not found:
            said = f"{most} computed steps can be afforded, and no solver has so few"
            raise BadRequestError(f"seconds: {seconds:g} given; {said}")
        return max(found, key=lambda one: one.score)
