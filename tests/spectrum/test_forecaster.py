"""The forecaster: history, the weighted sum, and its accuracy in every dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrum import ChebyshevRidge, Forecaster, LinearExtrapolation
from spectrum.weighted import _CHUNK_CPU

PAPER = ChebyshevRidge(horizon=50)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]


def trajectory(count: int, size: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Smooth curves over the steps with a little noise, as features are."""
    g = torch.Generator().manual_seed(seed)
    base, slope, curve = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(3))
    taus = [step / 50 for step in STEPS[:count]]
    return [(base + slope * t + curve * t * t).to(dtype) for t in taus]


def exact(values: list[torch.Tensor], target: int) -> torch.Tensor:
    """The forecast in float64 from the same remembered values."""
    weights = torch.from_numpy(PAPER.weights(STEPS[: len(values)], target))
    return (weights @ torch.stack([v.double().reshape(-1) for v in values])).view(values[0].shape)


@given(
    count=st.integers(1, 14),
    degree=st.integers(0, 6),
    ridge=st.floats(1e-3, 1),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_forecast_is_the_weighted_sum_rounded_once(
    count: int, degree: int, ridge: float, dtype: torch.dtype
) -> None:
    predictor = ChebyshevRidge(horizon=50, degree=degree, ridge=ridge)
    forecaster = Forecaster(predictor)
    values = trajectory(count, 200, dtype)
    for step, value in zip(STEPS, values, strict=False):
        forecaster.record(step, value)
    forecast = forecaster.predict(STEPS[count - 1] + 1)
    weights = predictor.weights(STEPS[:count], STEPS[count - 1] + 1)
    expected = torch.from_numpy(weights) @ torch.stack(values).double()
    assert forecast.dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
    bound = eps * (expected.abs() + float(np.abs(weights).sum()) * torch.stack(values).double().abs().amax(0))
    assert bool(((forecast.double() - expected).abs() <= bound + 1e-12).all())


def test_bfloat16_history_costs_one_rounding_and_bfloat16_weights_would_cost_more() -> None:
    """Accumulating in float32 stays within the rounding of the result; rounding the weights does not."""
    values = trajectory(14, 20_000, torch.bfloat16)
    target = 49
    forecaster = Forecaster(PAPER)
    for step, value in zip(STEPS, values, strict=True):
        forecaster.record(step, value)
    truth = exact(values, target)
    ours = (forecaster.predict(target).double() - truth).norm() / truth.norm()
    rounded = torch.from_numpy(PAPER.weights(STEPS, target)).to(torch.bfloat16)
    theirs = ((rounded @ torch.stack(values)).double() - truth).norm() / truth.norm()
    rounding = (truth.to(torch.bfloat16).double() - truth).norm() / truth.norm()
    assert ours <= 1.01 * rounding
    assert theirs > 1.2 * ours


def test_shape_is_kept_and_values_are_not_copied() -> None:
    value = torch.randn(2, 3, 4)
    forecaster = Forecaster(LinearExtrapolation())
    forecaster.record(0, value)
    assert forecaster.predict(1).shape == (2, 3, 4)
    assert forecaster.state_dict()["values"][0].data_ptr() == value.data_ptr()
    assert forecaster.bytes == value.numel() * 4


def test_only_what_the_predictor_needs_is_kept() -> None:
    forecaster = Forecaster(LinearExtrapolation())
    for step in range(6):
        forecaster.record(step, torch.full((3,), float(step)))
    assert forecaster.steps == (4, 5)
    assert forecaster.predict(8).tolist() == [8.0, 8.0, 8.0]


def test_squared_error_adds_up_over_shards() -> None:
    values, truth = trajectory(6, 100, torch.float64), trajectory(7, 100, torch.float64)[-1]
    whole, left, right = (Forecaster(PAPER) for _ in range(3))
    for step, value in zip(STEPS, values, strict=False):
        whole.record(step, value)
        left.record(step, value[:37])
        right.record(step, value[37:])
    both = [f.squared_error(8, t).read() for f, t in ((left, truth[:37]), (right, truth[37:]))]
    expected = whole.squared_error(8, truth).read()
    assert sum(e.error for e in both) == pytest.approx(expected.error)
    assert sum(e.truth for e in both) == pytest.approx(expected.truth)
    assert expected.error == pytest.approx(float((exact(values, 8) - truth).square().sum()))


def test_squared_error_is_read_later() -> None:
    """What only queues work must not read it: on the meta device there is nothing to read."""
    forecaster = Forecaster(PAPER)
    for step in (0, 1):
        forecaster.record(step, torch.empty(10, device="meta"))
    squares = forecaster.squared_error(2, torch.empty(10, device="meta"))
    assert {(value.device.type, value.dtype, value.ndim) for value in squares} == {("meta", torch.float64, 0)}


def test_state_is_restored_to_the_bit() -> None:
    forecaster, other = Forecaster(PAPER), Forecaster(PAPER)
    for step, value in zip(STEPS, trajectory(5, 50, torch.bfloat16), strict=False):
        forecaster.record(step, value)
    other.load_state_dict(forecaster.state_dict())
    assert torch.equal(other.predict(7), forecaster.predict(7))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_values_kept_in_host_memory_give_the_same_bits(device: str) -> None:
    here = Forecaster(PAPER)
    hosted, restored = (Forecaster(PAPER, storage=torch.device("cpu")) for _ in range(2))
    values = [value.to(device) for value in trajectory(6, 2 * _CHUNK_CPU + 17, torch.bfloat16)]
    for step, value in zip(STEPS, values, strict=False):
        here.record(step, value)
        hosted.record(step, value)
    restored.load_state_dict(hosted.state_dict(), values[0].device)
    assert {value.device.type for value in hosted.state_dict()["values"]} == {"cpu"}
    for forecaster in (hosted, restored):
        for step in (STEPS[5], 8, 20):
            found = forecaster.at(step)
            assert found.device.type == device and torch.equal(found, here.at(step))
        assert forecaster.squared_error(8, values[0]).read() == here.squared_error(8, values[0]).read()


def test_misuse_is_refused() -> None:
    forecaster = Forecaster(PAPER)
    with pytest.raises(ValueError, match="no value"):
        forecaster.predict(0)
    forecaster.record(3, torch.zeros(2))
    with pytest.raises(ValueError, match="cannot follow"):
        forecaster.record(3, torch.zeros(2))
    with pytest.raises(ValueError, match="stream is"):
        forecaster.record(4, torch.zeros(3))
    with pytest.raises(ValueError, match="not later"):
        forecaster.predict(3)
