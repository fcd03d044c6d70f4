"""Fitted rows and planned nodes on small problems whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spectrum.solver import Moments, Multistep, NodePlanner, Trajectory, moments_of, regress, unipc

RATES = torch.tensor([-3.0, -0.4, 1.5, 6.0], dtype=torch.float64)
LEVELS = np.linspace(1.0, 0.0, 13)
STEPS = len(LEVELS) - 1
Videos = list[torch.Tensor]


def numbers(seed: int, count: int, size: int = 400) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    values = list(numbers(seed, 3))
    return values, 2.0 * values[0] - 0.5 * values[1] + 0.25 * values[2]


def test_a_mixture_is_taken_apart() -> None:
    moments = [moments_of(*mixture(seed)) for seed in range(3)]
    found = regress(moments, np.zeros(3), 1e-12)
    assert found.row == pytest.approx([2.0, -0.5, 0.25])
    assert max(found.errors) < 1e-6


def test_inner_products_are_those_of_all_numbers() -> None:
    values = list(numbers(0, 3, 600_000))  # more than are read at a time
    found = moments_of([value.float() for value in values[:2]], values[2])
    stacked = torch.stack(values).float().double().numpy()
    assert np.allclose(found.gram, stacked[:2] @ stacked[:2].T)
    assert np.allclose(found.cross, stacked[:2] @ values[2].numpy(), atol=1e-2)
    assert found.target == pytest.approx(float(values[2].square().sum()))


def test_the_ridge_pulls_to_the_prior_and_nowhere_else() -> None:
    moments, prior = [moments_of(*mixture(seed)) for seed in range(2)], np.array([7.0, 0.0, -7.0])
    assert regress(moments, prior, 1e9).row == pytest.approx(prior, abs=1e-6)
    true = np.array([2.0, -0.5, 0.25])
    for ridge in (1e-3, 1.0, 1e3):
        assert regress(moments, true, ridge).row == pytest.approx(true)


def test_each_video_has_a_row_that_never_saw_it() -> None:
    moments = [
        moments_of(list(numbers(seed, 3)), numbers(seed + 50, 1)[0] + numbers(seed, 3)[0])
        for seed in range(5)
    ]
    weights, prior = [1.0, 0.25, 3.0, 0.5, 2.0], np.array([1.0, 0.0, 0.0])
    found = regress(moments, prior, 0.1, weights)
    for video, moment in enumerate(moments):
        others = [one for one in range(5) if one != video]
        alone = regress([moments[one] for one in others], prior, 0.1, [weights[one] for one in others]).row
        assert found.held_out[video] == pytest.approx(alone)
        values, target = list(numbers(video, 3)), numbers(video + 50, 1)[0] + numbers(video, 3)[0]
        off = sum(c * value for c, value in zip(alone, values, strict=True)) - target
        assert found.errors[video] == pytest.approx(float(off.norm() / target.norm()))
        assert moment.error(np.zeros(3)) == pytest.approx(1.0)


def test_weights_count_as_videos_do() -> None:
    moments = [moments_of(list(numbers(seed, 2)), numbers(seed + 9, 1)[0]) for seed in range(3)]
    twice = regress([*moments, moments[1]], np.zeros(2), 0.01).row
    assert regress(moments, np.zeros(2), 0.01, [1.0, 2.0, 1.0]).row == pytest.approx(twice)


@pytest.mark.parametrize(("videos", "ridge"), [(1, 1.0), (2, 0.0), (2, float("nan"))])
def test_too_little_to_fit_is_refused(videos: int, ridge: float) -> None:
    moments = [Moments(np.eye(1), np.ones(1), 1.0)] * videos
    with pytest.raises(ValueError, match="two videos"):
        regress(moments, np.zeros(1), ridge)


def velocity(x: torch.Tensor) -> torch.Tensor:
    """dx/dσ of a problem with as many exponentials as RATES has, so that as many values span its solution."""
    return x * RATES.repeat(x.numel() // len(RATES)).to(x.dtype)


def true_state(start: torch.Tensor, level: float) -> torch.Tensor:
    rates = RATES.repeat(start.numel() // len(RATES))
    return (start.double() * torch.exp((level - 1.0) * rates)).to(start.dtype)


def fitted(nodes: tuple[int, ...], prior: Multistep, ridge: float) -> tuple[Multistep, float]:
    """The greedy fit on the videos' own trajectories, as a calibration does it, and its worst error."""
    starts = [numbers(seed, 1)[0].float() for seed in range(3)]
    runs, rows, ends = [Trajectory(prior, start) for start in starts], [np.ones(1)], [*nodes[1:], STEPS]
    own = [rows[0]] * len(runs)
    for k, end in enumerate(ends, 1):
        for run, row in zip(runs, own, strict=True):
            run.record([velocity(run.combine(row))])
        moments = [
            moments_of([start, *(run.values(j)[0] for j in range(k))], true_state(start, float(LEVELS[end])))
            for start, run in zip(starts, runs, strict=True)
        ]
        found = regress(moments, prior.rows[k], ridge)
        rows.append(found.row)
        own = list(found.held_out)
    return Multistep(nodes, tuple(rows)), max(found.errors)


def test_the_fit_finds_what_no_general_solver_can_know() -> None:
    """Four exponentials: with as many values the exact solution lies in their span."""
    nodes = (0, 2, 5, 8, 10)
    prior = unipc([*LEVELS[list(nodes)], 0.0], nodes)
    solver, held_out = fitted(nodes, prior, 1e-4)
    start = numbers(99, 1)[0].float()
    truth, errors = true_state(start, 0.0), {}
    for name, one in (("fitted", solver), ("UniPC", prior)):
        run = Trajectory(one, start)
        for _ in nodes:
            run.record([velocity(run.state())])
        errors[name] = float((run.state() - truth).norm() / truth.norm())
    assert errors["UniPC"] > 0.2
    assert errors["fitted"] < 0.01 * errors["UniPC"]
    assert errors["fitted"] / 3 < held_out < 0.1 * errors["UniPC"]  # with two videos to fit to, not three


def euler() -> Multistep:
    rows = [np.concatenate([[1.0], np.diff(LEVELS)[:k]]) for k in range(STEPS + 1)]
    return Multistep(tuple(range(STEPS)), tuple(rows))


def planner(seed: int = 0, experts: tuple[int, ...] = (), power: float = 1.0) -> NodePlanner:
    """Gram matrix of a smooth curve with noise, and effects that fall with time."""
    rng = np.random.default_rng(seed)
    times = np.linspace(0.0, 1.0, STEPS)[:, None]
    curve = sum(rng.normal(size=200) * times**degree for degree in range(5))
    values = np.concatenate([rng.normal(size=(1, 200)), curve + 0.1 * rng.normal(size=(STEPS, 200))])
    fall = np.geomspace(10.0, 0.1, STEPS)
    return NodePlanner(values @ values.T, euler(), LEVELS, fall, fall, power, experts)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("nfe", [1, 2, 4, 6, STEPS])
def test_no_nodes_are_better(seed: int, nfe: int) -> None:
    one = planner(seed)
    every = [one.cost((0, *rest)) for rest in itertools.combinations(range(1, STEPS), nfe - 1)]
    assert one.cost(one.plan(nfe)) == pytest.approx(min(every))


def test_every_expert_has_a_node() -> None:
    """Also one that has the last step alone, which would not be computed for its error."""
    experts = (0,) * (STEPS - 1) + (1,)
    free, bound = planner(), planner(experts=experts)
    assert max(free.plan(3)) < STEPS - 1
    nodes = bound.plan(3)
    others = [(0, *rest) for rest in itertools.combinations(range(1, STEPS), 2) if max(rest) == STEPS - 1]
    assert len(nodes) == 3 and bound.cost(nodes) == pytest.approx(min(free.cost(one) for one in others))
    assert bound.cost((0, 1, 2)) == np.inf
    with pytest.raises(ValueError, match="within 2 … 12"):
        bound.plan(1)
    assert planner(experts=(0,) * STEPS).plan(4) == free.plan(4)


def test_the_cost_of_one_node_is_what_lies_outside_of_noise_and_first_value() -> None:
    one = planner()
    state = np.asarray(euler().rows[STEPS])
    own = one.gram[np.ix_([0, 1], [0, 1])]
    cross = one.gram[[0, 1]] @ state
    square = state @ one.gram @ state - cross @ np.linalg.solve(own, cross)
    assert one.cost((0,)) == pytest.approx(square, rel=1e-3)


def test_a_larger_power_weighs_sensitive_steps_more() -> None:
    flat, steep = planner(power=0.0), planner(power=2.0)
    state = flat.cost((0,))  # the result alone, which no sensitivity weighs
    assert steep.cost((0,)) == state
    for step in (1, STEPS - 1):  # sensitivities 10 and 0.1
        ends = [
            one.cost((0, step))
            - NodePlanner(one.gram, one.full, one.levels, [1e-9] * STEPS, one.response).cost((0, step))
            for one in (flat, steep)
        ]
        assert ends[1] / ends[0] == pytest.approx(flat.sensitivity[step] ** 4, rel=1e-3)
