"""Universal plans: what other models have shown, at the steps of any sampler."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from runtime.request.config import shipped
from spectrum import paper_schedule
from spectrum.calibration import Measured, from_triangle
from spectrum.universal import TABLE, Example, Universal, flow_levels, log_shift, universal

MODELS = ("wan-tiny", "wan2.2-tiny")


def measured(model: str) -> Measured:
    content = json.loads(shipped("calibrations", f"{model}.json").read_text())
    names = ("noise_levels", "grams", "trajectory", "sensitivity", "response", "scale")
    return Measured(**{name: content[name] for name in names})


def example(model: str) -> Example:
    of = measured(model)
    return Example(of.noise_levels, of.gram("guided"), of.sensitivity)


def times(steps: int) -> np.ndarray:
    """Time 1 − τ at the beginning of each of `steps` even steps."""
    return np.arange(steps) / steps


def straight(steps: int, shift: float) -> Example:
    """A model whose velocity is a + b t, with ⟨a, a⟩ = 2, ⟨a, b⟩ = −1, ⟨b, b⟩ = 3, and sensitivity e^t."""
    return Example(flow_levels(steps, shift), straight_gram(times(steps)), np.exp(times(steps)).tolist())


def straight_gram(at: np.ndarray) -> np.ndarray:
    gram: np.ndarray = 2.0 - at[:, None] - at[None, :] + 3.0 * np.outer(at, at)
    return gram


@pytest.mark.parametrize("model", MODELS)
def test_at_its_own_steps_an_example_is_as_it_was_measured(model: str) -> None:
    own = example(model)
    gram, sensitivity = own.at(own.noise_levels)
    np.testing.assert_allclose(gram, own.gram, rtol=0, atol=1e-12 * own.gram.max())
    np.testing.assert_allclose(sensitivity, own.sensitivity, rtol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_of_one_example_plans_and_weights_are_those_of_its_calibration(model: str) -> None:
    alone, own = Universal((example(model),)), measured(model)
    planner, calibrated = alone.planner(own.noise_levels), own.planner("guided")
    for nfe in (8, 14):
        assert planner.plan(nfe).computed == calibrated.plan(nfe).computed
    weights = [of.weights([4, 9], 12) for of in (alone.predictor(own.noise_levels), own.predictor("guided"))]
    np.testing.assert_allclose(*weights, rtol=1e-8)


@pytest.mark.parametrize("steps", [20, 33, 90])
def test_between_and_after_an_examples_steps_its_velocity_goes_on_straight(steps: int) -> None:
    gram, sensitivity = straight(50, 3.0).at(flow_levels(steps, 3.0))
    np.testing.assert_allclose(gram, straight_gram(times(steps)), atol=1e-9)
    known = np.minimum(times(steps), times(50)[-1])  # sensitivities stay as they are at the last step
    np.testing.assert_allclose(sensitivity, np.exp(known), rtol=1e-9)


def test_steps_of_two_shifts_meet_halfway_between_noise_level_and_number() -> None:
    shift, own = 12.0, 3.0
    even = 1.0 - times(40)[1:]
    odds = even / (1.0 - even) * math.sqrt(shift / own)
    meeting = 1.0 - odds / (1.0 + odds)
    sensitivity = straight(50, own).at(flow_levels(40, shift))[1]
    inside = meeting < times(50)[-1]
    np.testing.assert_allclose(sensitivity[1:][inside], np.exp(meeting[inside]), rtol=1e-9)


@pytest.mark.parametrize("shift", [0.7, 1.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 50])
def test_the_shift_of_a_sampler_is_seen_in_its_noise_levels(steps: int, shift: float) -> None:
    seen = log_shift(flow_levels(steps, shift))
    assert seen == pytest.approx(math.log(shift) if steps % 2 == 0 else seen)
    assert math.isfinite(seen)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_there_is_a_plan_for_any_steps_and_shift(steps: int, shift: float) -> None:
    levels = flow_levels(steps, shift)
    planner, predictor = universal().planner(levels), universal().predictor(levels)
    for nfe in {1, min(5, steps), steps}:
        computed = planner.plan(nfe).computed
        assert computed[0] == 0 and len(computed) == nfe
        assert all(a < b for a, b in pairwise(computed)) and computed[-1] < steps
    for target in range(2, steps):
        weights = predictor.weights([0, target - 1], target)
        assert np.isfinite(weights).all() and weights.sum() == pytest.approx(1.0)
        assert np.abs(weights).max() < 20.0


def test_levels_may_repeat_but_not_ascend() -> None:
    repeated = [*np.repeat(flow_levels(10, 3.0)[:-1], 2).tolist(), 0.0]
    assert universal().planner(repeated).plan(6).nfe == 6
    with pytest.raises(ValueError, match="must descend"):
        universal().predictor([0.5, 0.9, 0.0])
    with pytest.raises(ValueError, match="at most 200 steps, got 201"):
        universal().planner(flow_levels(201))
    with pytest.raises(ValueError, match="no two steps of one noise level"):
        Example([1.0, 0.5, 0.5, 0.0], np.eye(3), [1.0] * 3)
    with pytest.raises(ValueError, match="an example of 3 steps needs"):
        Example([1.0, 0.7, 0.5, 0.0], np.eye(2), [1.0] * 3)


@pytest.mark.parametrize("nfe", [8, 10, 14])
@pytest.mark.parametrize("model", MODELS)
def test_for_a_model_left_out_it_expects_less_error_than_the_papers_steps(model: str, nfe: int) -> None:
    content = json.loads(TABLE.read_text())["models"]
    others = tuple(
        Example(one["noise_levels"], from_triangle(one["gram"], 50), one["sensitivity"])
        for one in content
        if one["model"] != model
    )
    assert len(others) == len(content) - 1 == 2
    own = measured(model)
    computed = Universal(others).planner(own.noise_levels).plan(nfe).computed
    growth = {8: 6.0, 10: 3.0, 14: 0.75}[nfe]
    paper = paper_schedule(50, warmup=4 if nfe == 8 else 5, alpha=growth)
    assert paper.nfe == nfe
    price = own.planner("guided").price
    assert price(computed).error < price(paper.computed).error


@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_of_the_shipped_calibrations(model: str) -> None:
    kept = {one["model"]: one for one in json.loads(TABLE.read_text())["models"]}[model]
    content = json.loads(shipped("calibrations", f"{model}.json").read_text())
    assert kept["revision"] == content["conditions"]["revision"]
    assert kept["gram"] == content["grams"]["guided"]
    assert kept["sensitivity"] == content["sensitivity"]
