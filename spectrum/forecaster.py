"""Forecaster: the history of one stream, and the forecasts made from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from spectrum.predictor import Predictor
from spectrum.storage import kept, placed
from spectrum.weighted import weighted_sum


class SquaredError(NamedTuple):
    """Sums of squares of a forecast's error and of the true value, over one shard.

    They add up over ranks; √(error / truth) is the relative error.
    """

    error: float
    truth: float


class Squares(NamedTuple):
    """A squared error still on its device: two 0-dim float64 tensors.

    An accelerator has only queued them, so reading waits for it: read after a synchronisation.
    """

    error: torch.Tensor
    truth: torch.Tensor

    @classmethod
    def total(cls, several: Sequence[Squares]) -> Squares:
        """Sum of at least one squared error, added in order."""
        first, *others = several
        for one in others:
            first = cls(first.error + one.error, first.truth + one.truth)
        return first

    def read(self) -> SquaredError:
        """Read the two numbers; waits for the accelerator."""
        return SquaredError(float(self.error), float(self.truth))


class Forecaster:
    """Remembers computed values of one stream and predicts it at other steps.

    A stream is a tensor of fixed shape that is known at computed steps. Recording copies nothing: the tensor
    itself is kept, in its own dtype, so the caller must not write to it afterwards.

    Args:
        predictor: turns remembered steps into weights.
        storage: device on which values are kept; by default the one on which they are computed. Forecasts are
            made on the latter in any case, from pieces that are fetched. The newest value stays on it, too.

    Example:
        >>> from spectrum import LinearExtrapolation
        >>> forecaster = Forecaster(LinearExtrapolation())
        >>> forecaster.record(0, torch.tensor([1.0]))
        >>> forecaster.record(2, torch.tensor([3.0]))
        >>> forecaster.predict(3)
        tensor([4.])
    """

    def __init__(self, predictor: Predictor, storage: torch.device | None = None):
        self._predictor, self._storage = predictor, storage
        self._device: torch.device | None = None
        self._newest: torch.Tensor | None = None
        self._steps: list[int] = []
        self._values: list[torch.Tensor] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """Remembered steps, ascending."""
        return tuple(self._steps)

    @property
    def bytes(self) -> int:
        """Memory held by the remembered values, in bytes."""
        return sum(v.numel() * v.element_size() for v in self._values)

    def record(self, step: int, value: torch.Tensor) -> None:
        """Remember the computed `value` of step `step`, and forget values that the predictor no longer needs.

        Raises:
            ValueError: `step` is not later than the last one, or `value` differs from it in shape or dtype.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"step {step} cannot follow step {self._steps[-1]}")
        self._check_alike(step, value)
        self._device, self._newest = value.device, value.detach()
        self._steps.append(step)
        self._values.append(kept(self._newest, self._storage))
        if self._predictor.memory is not None:
            del self._steps[: -self._predictor.memory], self._values[: -self._predictor.memory]

    def predict(self, step: int) -> torch.Tensor:
        """Forecast of step `step`: a weighted sum with float64 weights, accumulated in float32.

        Returns:
            A tensor of the shape and dtype of the recorded values.

        Raises:
            ValueError: nothing was recorded, or `step` is not later than the last recorded step.
        """
        if not self._steps:
            raise ValueError(f"no value was recorded to forecast step {step} from")
        if step <= self._steps[-1]:
            raise ValueError(f"step {step} is not later than the last recorded step {self._steps[-1]}")
        return weighted_sum(self._predictor.weights(self._steps, step).tolist(), self._values, self._device)

    def at(self, step: int) -> torch.Tensor:
        """Value of step `step`: the recorded one if it is the last recorded step, otherwise its forecast."""
        if self._steps and step == self._steps[-1]:
            return self._values[-1].to(device=self._device) if self._newest is None else self._newest
        return self.predict(step)

    def squared_error(self, step: int, truth: torch.Tensor) -> Squares:
        """Squared error that the forecast of step `step` has against the computed value `truth`."""
        self._check_alike(step, truth)
        difference = self.predict(step).float().sub_(truth)
        return Squares(difference.square_().sum().double(), truth.float().square().sum().double())

    def _check_alike(self, step: int, value: torch.Tensor) -> None:
        if self._values and (value.shape, value.dtype) != (self._values[-1].shape, self._values[-1].dtype):
            raise ValueError(
                f"step {step} has {list(value.shape)} {value.dtype}, but the stream is "
                f"{list(self._values[-1].shape)} {self._values[-1].dtype}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Remembered steps and values; the values are not copied."""
        if self._storage is not None and self._device is not None and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # copies to the host may still be running
        return {"steps": list(self._steps), "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Replace the history by a `state_dict`.

        Args:
            state: what `state_dict` returned.
            device: device on which forecasts are made; by default the one on which values are kept.
        """
        self._device, self._newest, self._steps = device, None, list(state["steps"])
        self._values = [placed(value, self._storage, device) for value in state["values"]]
