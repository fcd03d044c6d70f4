"""Samplers fused with forecasts, against the sampler and a forecaster, and against tables of known steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from spectrum import Blend, ChebyshevRidge, Forecaster, LinearExtrapolation, Predictor
from spectrum.solver import FusedSampler, Multistep, skipping, traced, unipc

STEPS = 20
PREDICTORS = [
    LinearExtrapolation(),
    ChebyshevRidge(horizon=STEPS),
    Blend(ChebyshevRidge(horizon=STEPS), LinearExtrapolation(), 0.5),
]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SAMPLERS = [
    UniPCMultistepScheduler(**FLOW),
    UniPCMultistepScheduler(solver_order=3, **FLOW),
    DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **FLOW),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
]


def begun(sampler: SchedulerMixin) -> SchedulerMixin:
    sampler = type(sampler).from_config(sampler.config)
    sampler.set_timesteps(STEPS)
    sampler.set_begin_index(0)
    return sampler


def table(sampler: SchedulerMixin) -> Multistep:
    sampler = begun(sampler)
    return traced(lambda i, v, x: sampler.step(v, sampler.timesteps[i], x, return_dict=False)[0], STEPS)


def velocity(x: torch.Tensor, step: int) -> torch.Tensor:
    return x * (1.5 - 0.03 * step) + torch.sin(2.0 * x + 0.1 * step)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda one: f"{type(one).__name__}{one.order}")
@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    ("computed", "forgotten"),
    [({0, 1, 2, 5, 9, 14}, ()), ({0}, ()), ({0, 3, 8, 9, 19}, (8,)), (set(range(STEPS)), ())],
    ids=["some", "first", "forgetting", "all"],
)
def test_states_are_those_of_the_sampler_with_forecasts(
    sampler: SchedulerMixin, predictor: Predictor, computed: set[int], forgotten: tuple[int, ...]
) -> None:
    """At every step, computed or not; also where an expert forgets what was before."""
    plain, forecaster = begun(sampler), Forecaster(predictor)
    fused, values = FusedSampler(table(sampler), predictor), []
    noise = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = noise
    for step in range(STEPS + 1):
        numbers = fused.state()
        state = sum((w * v for w, v in zip(numbers[1:], values, strict=True)), numbers[0] * noise)
        assert float((state - x).norm() / x.norm()) < 1e-5, step
        if step == STEPS:
            break
        if step in forgotten:
            forecaster = Forecaster(predictor)
            fused.forget()
        assert fused.remembers == bool(forecaster.steps)
        if step in computed:
            values.append(velocity(x, step))
            forecaster.record(step, values[-1])
            fused.compute()
        else:
            fused.forecast()
        v = forecaster.at(step)
        x = plain.step(v, plain.timesteps[step], x, return_dict=False)[0].double()
    assert fused.nodes == sorted(computed)


@pytest.mark.parametrize("nodes", [(0, 2, 4, 9, 13), (0,), (0, 1, 19)])
def test_steps_that_are_known_beforehand_give_the_table_of_a_plan(nodes: tuple[int, ...]) -> None:
    full, predictor = table(SAMPLERS[0]), PREDICTORS[2]
    planned, fused = skipping(full, nodes, predictor), FusedSampler(full, predictor)
    for step in range(STEPS):
        if step in nodes:
            assert np.allclose(fused.state(), planned.rows[len(fused.nodes)], atol=1e-12)
            fused.compute()
        else:
            fused.forecast()
    assert np.allclose(fused.state(), planned.rows[-1], atol=1e-12)


def test_nothing_is_forecast_from_nothing() -> None:
    fused = FusedSampler(table(SAMPLERS[0]), PREDICTORS[0])
    with pytest.raises(ValueError, match="no value was recorded to forecast step 0 from"):
        fused.forecast()
    fused.compute()
    fused.forecast()
    fused.forget()
    assert not fused.remembers
    with pytest.raises(ValueError, match="step 2"):
        fused.forecast()
    with pytest.raises(ValueError, match="every step"):
        FusedSampler(unipc([0.9, 0.5, 0.0], (0, 2)), PREDICTORS[0])
