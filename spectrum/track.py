"""Track: one tensor of a generation, driven step by step, computed and recorded or forecast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from spectrum.forecaster import Forecaster, Squares
from spectrum.predictor import Predictor
from spectrum.schedule import StepKind


class Advanced(NamedTuple):
    """Result of one step of a `Track`.

    Attributes:
        value: the computed or forecast value.
        squares: error that a forecast of a computed step would have had; None at forecast steps, and if
            nothing was remembered to forecast from.
    """

    value: torch.Tensor
    squares: Squares | None = None


class Track:
    """Drives one branch of a network through one generation: computes and records, or forecasts.

    This is all that an integration needs: it says how a value is computed, and a schedule says when. Every
    branch of classifier-free guidance has a track of its own, and every generation begins with new ones.

    Args:
        predictor: turns remembered steps into weights.
        storage: device on which values are kept, as for `Forecaster`.

    Example:
        >>> from spectrum import FixedSchedule, LinearExtrapolation
        >>> schedule, track = FixedSchedule.explicit(4, [0, 1]), Track(LinearExtrapolation())
        >>> [float(track.advance(i, schedule.kind(i), lambda: torch.tensor(2.0 * i)).value) for i in range(4)]
        [0.0, 2.0, 4.0, 6.0]
    """

    def __init__(self, predictor: Predictor, storage: torch.device | None = None):
        self._forecaster = Forecaster(predictor, storage)

    @property
    def steps(self) -> tuple[int, ...]:
        """Remembered steps, ascending."""
        return self._forecaster.steps

    @property
    def bytes(self) -> int:
        """Memory held by the remembered values, in bytes."""
        return self._forecaster.bytes

    def advance(self, step: int, kind: StepKind, compute: Callable[[], torch.Tensor]) -> Advanced:
        """Compute and record, or forecast, the value of step `step`; steps ascend.

        Args:
            step: index of the step.
            kind: whether the step is computed or forecast.
            compute: computes the value, of the same shape and dtype at every step. It is called once at a
                computed step and never at a forecast one. Its result is kept without a copy, so it must not
                be written to afterwards.

        Raises:
            ValueError: the first step is a forecast, a step is not later than the last computed one, or a
                computed value differs in shape or dtype from those before.
        """
        if kind is StepKind.FORECAST:
            return Advanced(self._forecaster.predict(step))
        value = compute()
        squares = self._forecaster.squared_error(step, value) if self.steps else None
        self._forecaster.record(step, value)
        return Advanced(value, squares)

    def state_dict(self) -> dict[str, Any]:
        """Remembered steps and values, for a checkpoint; the values are not copied."""
        return self._forecaster.state_dict()

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Replace the history by a `state_dict`, to resume a generation.

        Args:
            state: what `state_dict` returned.
            device: device on which forecasts are made; by default the one on which values are kept.
        """
        self._forecaster.load_state_dict(state, device)
