"""Solvers as tables of numbers, against the samplers that they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from spectrum import CalibratedPredictor, Forecaster, LinearExtrapolation
from spectrum.solver import Multistep, Trajectory, skipping, traced, unipc

PLANNED = (0, 2, 4, 6, 9, 13, 20, 30, 40, 46)
LONGER = (0, 1, 2, 3, 5, 7, 10, 13, 17, 23, 31, 38, 44, 48)
STEPS = 50


def unipc_sampler(nodes: tuple[int, ...] | None = None) -> UniPCMultistepScheduler:
    """diffusers' sampler with 50 steps, or with its steps at only some of these times."""
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler.set_timesteps(STEPS)
    if nodes is not None:
        kept = list(nodes)
        sampler.sigmas = torch.cat([sampler.sigmas[kept], sampler.sigmas[-1:]])
        sampler.timesteps, sampler.num_inference_steps = sampler.timesteps[kept], len(kept)
    sampler.set_begin_index(0)
    return sampler


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A model that is not linear: what it gives depends on where a solver has gone before."""
    return x * (0.6 + sigma) + torch.sin(2.0 * x + 3.0 * sigma)


def stepping(sampler: SchedulerMixin) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda index, v, x: sampler.step(v, sampler.timesteps[index], x, return_dict=False)[0]


def sampled(sampler: SchedulerMixin) -> torch.Tensor:
    x, step = noise(), stepping(sampler)
    for index in range(len(sampler.timesteps)):
        x = step(index, velocity(x, float(sampler.sigmas[index])), x)
    return x


def solved(solver: Multistep, levels: torch.Tensor) -> torch.Tensor:
    trajectory = Trajectory(solver, noise())
    for node in solver.nodes:
        trajectory.record([velocity(trajectory.state(), float(levels[node]))])
    return trajectory.state()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("nodes", [PLANNED, LONGER, (0, 49), (0,)])
def test_unipc_at_planned_times_is_that_of_diffusers(nodes: tuple[int, ...]) -> None:
    sampler = unipc_sampler(nodes)
    ours = unipc(sampler.sigmas.tolist(), nodes)
    theirs = traced(stepping(unipc_sampler(nodes)), len(nodes))
    for row, true in zip(ours.rows, theirs.rows, strict=True):
        assert np.allclose(row, true, atol=2e-5)
    assert relative(solved(ours, unipc_sampler().sigmas), sampled(sampler)) < 1e-4


@pytest.mark.parametrize(
    "sampler",
    [
        unipc_sampler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        DPMSolverMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
            algorithm_type="dpmsolver++",
        ),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_sampler_is_the_table_that_it_leaves_on_unit_vectors(sampler: SchedulerMixin) -> None:
    found = []
    for run in (lambda s: traced(stepping(s), STEPS), sampled):
        sampler.set_timesteps(STEPS)
        sampler.set_begin_index(0)
        found.append(run(sampler))
    assert relative(solved(found[0], sampler.sigmas), found[1]) < 1e-4


@pytest.mark.parametrize("nodes", [PLANNED, (0,), (0, 1, 49)])
def test_a_plan_is_a_table_too(nodes: tuple[int, ...]) -> None:
    """The full sampler with calibrated forecasts, run as it is, and as a multistep solver of its nodes."""
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(size=(STEPS, 80)), axis=0)
    predictor = CalibratedPredictor(values @ values.T)
    sampler, forecaster, x = unipc_sampler(), Forecaster(predictor), noise()
    step = stepping(sampler)
    for index in range(STEPS):
        if index in nodes:
            forecaster.record(index, velocity(x, float(sampler.sigmas[index])))
        x = step(index, forecaster.at(index), x)
    ours = skipping(traced(stepping(unipc_sampler()), STEPS), nodes, predictor)
    assert relative(solved(ours, sampler.sigmas), x) < 1e-4


def test_branches_apart_are_the_guided_velocity() -> None:
    levels = unipc_sampler().sigmas
    joint = unipc([*levels[list(PLANNED)].tolist(), 0.0], PLANNED)
    scales = [5.0] * 6 + [3.0] * 4
    one, two = Trajectory(joint, noise()), Trajectory(joint.apart(scales), noise())
    for scale, node in zip(scales, PLANNED, strict=True):
        uncond = velocity(one.state(), float(levels[node]))
        gap = torch.cos(two.state())
        one.record([uncond + scale * gap])
        two.record([uncond, gap])
    assert relative(two.state(), one.state()) < 1e-5
    with pytest.raises(ValueError, match="one value per node"):
        joint.apart(scales).apart(scales)


def test_a_trajectory_goes_on_from_what_was_kept() -> None:
    solver = unipc([0.9, 0.5, 0.2, 0.0], (0, 3, 7))
    whole = Trajectory(solver, noise())
    for node in range(2):
        whole.record([velocity(whole.state(), node)])
    again = Trajectory(solver, noise())
    again.load({node: whole.values(node) for node in range(2)})
    assert again.node == 2 and again.bytes == whole.bytes == 3 * noise().numel() * 4
    assert torch.equal(again.state(), whole.state())
    for one in (whole, again):
        one.record([velocity(one.state(), 2)])
        with pytest.raises(ValueError, match="3 nodes of 1"):
            one.record([noise()])
    assert torch.equal(again.state(), whole.state())


def test_a_trajectory_says_how_far_an_estimate_is_off() -> None:
    one = Trajectory(Multistep((0,), (np.ones(1), np.array([1.0, -1.0]))), noise())
    one.record([2.0 * noise()])
    squares = one.squared_error(np.array([1.0, 0.25]), 2.0 * noise()).read()
    assert squares.error / squares.truth == pytest.approx(0.0625)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Multistep((1,), (np.ones(1), np.ones(2))), "ascend from 0"),
        (lambda: Multistep((0, 2, 2), tuple(np.ones(k + 1) for k in range(4))), "ascend from 0"),
        (lambda: Multistep((0,), (np.ones(1), np.ones(3))), "1 nodes of 1 values do not fit"),
        (lambda: Multistep((0,), (np.ones(1), np.array([1.0, np.nan]))), "finite"),
        (lambda: unipc([0.9, 0.9, 0.0], (0, 1)), "descend to 0"),
        (lambda: unipc([0.9, 0.5, 0.1], (0, 1)), "descend to 0"),
        (lambda: skipping(unipc([0.9, 0.5, 0.0], (0, 2)), (0,), LinearExtrapolation()), "every step"),
    ],
)
def test_what_is_no_solver_is_refused(make: Callable[[], Multistep], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
