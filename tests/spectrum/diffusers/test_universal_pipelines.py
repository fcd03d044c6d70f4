"""Universal presets for pipelines: planned for the scheduler's own noise levels, wherever it begins."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from spectrum import StepKind
from spectrum.diffusers import Preset, enable, report
from spectrum.universal import flow_levels, universal
from tests.pipelines import flux, stable_diffusion, wan, wan_transformer

STEPS = 12


@pytest.mark.parametrize("make", [flux, wan])
@pytest.mark.parametrize(("name", "nfe"), [("universal", 8), ("universal-10", 10), ("universal-8", 8)])
def test_steps_are_planned_for_the_schedulers_noise_levels(make: Any, name: str, nfe: int) -> None:
    tiny = make()
    enable(tiny.pipe, name)
    tiny.run(STEPS)
    levels = tiny.pipe.scheduler.sigmas.tolist()
    told = report(tiny.pipe)["transformer"]
    assert told.computed == universal().planner(levels).plan(nfe).computed
    assert (told.nfe, told.stream, told.preset) == (nfe, "velocity", name)


def test_another_generation_is_planned_anew() -> None:
    tiny = flux()
    enable(tiny.pipe, "universal-8")
    tiny.run(20)
    first = report(tiny.pipe)["transformer"].computed
    tiny.pipe.scheduler.register_to_config(use_dynamic_shifting=False, shift=12.0)
    tiny.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(tiny.pipe.scheduler.config)
    tiny.run(20)
    second = report(tiny.pipe)["transformer"].computed
    assert second == universal().planner(tiny.pipe.scheduler.sigmas.tolist()).plan(8).computed != first


def test_two_transformers_have_one_plan_and_one_history() -> None:
    tiny = wan(transformer_2=wan_transformer(), boundary_ratio=0.7)
    enable(tiny.pipe, "universal-8")
    tiny.run(STEPS)
    planned = universal().planner(tiny.pipe.scheduler.sigmas.tolist()).plan(8).computed
    assert {told.computed for told in report(tiny.pipe).values()} == {planned}


def test_a_generation_that_begins_later_has_the_later_part_of_the_plan() -> None:
    levels, first = flow_levels(30, 3.0), 9
    preset = Preset.load("universal-10").at(lambda: levels)
    planned = universal().planner(levels).plan(10).computed
    schedule, predictor = preset.schedule(30 - first), preset.predictor(30 - first)
    computed = tuple(step for step in range(30 - first) if schedule.kind(step) is StepKind.COMPUTE)
    assert computed == (0, *(step - first for step in planned if step > first))
    expected = universal().predictor(levels).weights([12, 15], 18)
    assert predictor.weights([12 - first, 15 - first], 18 - first).tolist() == expected.tolist()


def test_a_transformer_alone_has_typical_noise_levels() -> None:
    steps = 20
    schedule = Preset.load("universal-8").schedule(steps)
    predictor = Preset.load("universal").predictor(steps)
    assert getattr(schedule, "computed", None) == universal().planner(flow_levels(steps)).plan(8).computed
    expected = universal().predictor(flow_levels(steps)).weights([2, 5], 7)
    assert predictor.weights([2, 5], 7).tolist() == expected.tolist()


def test_a_scheduler_of_another_kind_is_refused_with_its_noise_levels() -> None:
    tiny = stable_diffusion()
    tiny.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    enable(tiny.pipe, "universal")
    with pytest.raises(ValueError, match="noise levels must descend within 1 … 0"):
        tiny.run(STEPS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stream": "feature"}, "needs velocity"),
        ({"predictor": {"kind": "chebyshev"}}, "go together"),
        ({"schedule": {"kind": "paper"}}, "go together"),
        ({"schedule": {"kind": "universal", "nfe": 0}}, "nfe: 0 given"),
        ({"schedule": {"kind": "universal", "warmup": 1}}, "universal takes nfe"),
    ],
)
def test_a_preset_that_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    whole = {"stream": "velocity", "schedule": {"kind": "universal"}, "predictor": {"kind": "universal"}}
    assert Preset.load(whole).stream == "velocity"
    with pytest.raises(ValueError, match=said):
        Preset.load(whole | changes)


def test_it_is_not_for_features() -> None:
    with pytest.raises(ValueError, match="stream: 'feature' given; the preset universal needs velocity"):
        enable(flux().pipe, "universal", stream="feature")
