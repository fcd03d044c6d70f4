"""The history of one stream and the forecasts made from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from spectrum.predictor import Predictor


class SquaredError(NamedTuple):
    """Two sums of squares over a shard. They add up over ranks; √(error / truth) is the relative error."""

    error: float
    truth: float


class Forecaster:
    """Remembers computed values of one stream and predicts it at other steps.

    A stream is any tensor of one shape that is known at computed steps. Nothing is copied when a value is
    recorded: the tensor itself is kept, in its own dtype, so the caller must not write to it afterwards.

    Args:
        predictor: turns remembered steps into weights.
        storage: where values are kept instead of where they come from; forecasts are still made there, out
            of pieces that are fetched.

    Example:
        >>> forecaster = Forecaster(LinearExtrapolation())
        >>> forecaster.record(0, torch.tensor([1.0]))
        >>> forecaster.record(2, torch.tensor([3.0]))
        >>> forecaster.predict(3)
        tensor([4.])
    """

    def __init__(self, predictor: Predictor, storage: torch.device | None = None):
        self._predictor, self._storage = predictor, storage
        self._device: torch.device | None = None
        self._steps: list[int] = []
        self._values: list[torch.Tensor] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """Remembered steps, ascending."""
        return tuple(self._steps)

    @property
    def bytes(self) -> int:
        """Memory held by the remembered values."""
        return sum(v.numel() * v.element_size() for v in self._values)

    def record(self, step: int, value: torch.Tensor) -> None:
        """Remember the computed `value` of step `step`, and forget what the predictor will not look at again.

        Raises:
            ValueError: `step` is not later than the last one, or `value` differs from it in shape or dtype.
        """
        if self._steps and step <= self._steps[-1]:
            raise ValueError(f"step {step} cannot follow step {self._steps[-1]}")
        if self._values and (value.shape, value.dtype) != (self._values[-1].shape, self._values[-1].dtype):
            raise ValueError(
                f"step {step} has {list(value.shape)} {value.dtype}, but the stream is "
                f"{list(self._values[-1].shape)} {self._values[-1].dtype}"
            )
        self._device = value.device
        self._steps.append(step)
        self._values.append(value.detach().to(self._storage or value.device))
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
        """The value of step `step`: as recorded if it is the last recorded step, otherwise its forecast."""
        if self._steps and step == self._steps[-1]:
            return self._values[-1].to(device=self._device)
        return self.predict(step)

    def squared_error(self, step: int, truth: torch.Tensor) -> SquaredError:
        """How far the forecast of step `step` would have been from the computed value `truth`."""
        difference = self.predict(step).float().sub_(truth)
        return SquaredError(float(difference.square_().sum()), float(truth.float().square().sum()))

    def state_dict(self) -> dict[str, Any]:
        """What is remembered; the values are not copied."""
        return {"steps": list(self._steps), "values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Replace what is remembered by a `state_dict`.

        Args:
            device: where forecasts are to be made, by default where values are kept.
        """
        self._device, self._steps = device, list(state["steps"])
        self._values = [value.to(device=self._storage or device) for value in state["values"]]


def weighted_sum(
    weights: list[float], values: list[torch.Tensor], device: torch.device | None = None
) -> torch.Tensor:
    """Σ weights[k] · values[k] in float32 (float64 for float64 values), rounded once to the values' dtype.

    Works through the values in chunks that stay in cache, so each value is read from memory once and no
    K-fold temporary is made. float32 weights matter: rounded to bfloat16, weights of opposite sign no longer
    cancel.

    Args:
        device: where the sum is made, by default where the values are; a chunk of each is there at a time.
    """
    first = values[0]
    device = first.device if device is None else device
    wide = torch.promote_types(first.dtype, torch.float32)
    flat = [v.reshape(-1) for v in values]
    size = flat[0].numel()
    chunk = min(size, _CHUNK_CPU if device.type == "cpu" else _CHUNK_ACCELERATOR)
    weights_K = torch.tensor(weights, dtype=wide, device=device)
    block = torch.empty(len(flat), chunk, dtype=wide, device=device)
    result = torch.empty(size, dtype=first.dtype, device=device)
    for start in range(0, size, max(chunk, 1)):
        part = block[:, : min(chunk, size - start)]
        for row, value in zip(part, flat, strict=True):
            row.copy_(value[start : start + part.shape[1]])
        result[start : start + part.shape[1]] = weights_K @ part
    return result.view(first.shape)


_CHUNK_CPU = 65_536  # elements per value: 14 values in float32 are 3.7 MB
_CHUNK_ACCELERATOR = 1_048_576
