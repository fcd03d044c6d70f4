"""Generations that follow, interrupt or interleave each other: no forecast from another's history."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import pytest
import torch

from spectrum import FixedSchedule, LinearExtrapolation, paper_schedule
from spectrum.diffusers import Preset, disable, enable, report
from spectrum.diffusers.call import Call
from spectrum.diffusers.generation import Generation
from tests.pipelines import (
    TEXT,
    Evaluations,
    Tiny,
    cogvideox,
    flux,
    noise,
    sd3,
    stable_diffusion,
    wan,
    wan_transformer,
)

IMAGE = torch.zeros(1, 3, 64, 64)
STREAMS = pytest.mark.parametrize("stream", ["feature", "velocity"])


class StopError(Exception):
    """Raised in the middle of a generation."""


def stopping(at: int) -> Any:
    def callback(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise StopError
        return values

    return callback


def interrupting(at: int) -> Any:
    def callback(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= at
        return values

    return callback


def fresh(make: Any = flux, stream: str = "velocity", **changes: Any) -> torch.Tensor:
    """What a generation gives on a pipeline that has done nothing before."""
    tiny = make()
    enable(tiny.pipe, "paper", stream=stream)
    return tiny.run(**changes)


@pytest.fixture(params=["feature", "velocity"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    one = flux()
    one.stream = request.param
    enable(one.pipe, "paper", stream=one.stream)
    return one


LATER: dict[str, dict[str, Any]] = {
    "the same again": {},
    "longer": {"steps": 20},
    "shorter": {"steps": 7},
    "one step": {"steps": 1},
    "another batch size": {"num_images_per_prompt": 2},
    "another resolution": {"height": 96},
    "another prompt": {"prompt_embeds": noise(1, TEXT, 32, seed=9)},
    "with guidance": {
        "negative_prompt_embeds": noise(1, TEXT, 32, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 32, seed=2),
        "true_cfg_scale": 3.0,
    },
}


@pytest.mark.parametrize("later", LATER)
def test_the_next_generation_is_as_if_it_were_the_first(tiny: Tiny, later: str) -> None:
    tiny.run()
    assert torch.equal(tiny.run(**LATER[later]), fresh(stream=tiny.stream, **LATER[later]))
    steps = LATER[later].get("steps", 12)
    assert report(tiny.pipe)["transformer"].computed == paper_schedule(steps).computed


@pytest.mark.parametrize("at", [0, 1, 6, 7])
@pytest.mark.parametrize("how", [stopping, interrupting])
def test_a_generation_after_one_that_was_stopped_begins_anew(tiny: Tiny, how: Any, at: int) -> None:
    try:
        tiny.run(callback_on_step_end=how(at))
    except StopError:
        assert how is stopping
    else:
        assert how is interrupting
    tiny.pipe._interrupt = False
    assert torch.equal(tiny.run(seed=3), fresh(stream=tiny.stream, seed=3))


def test_a_generation_after_one_that_failed_in_the_transformer_begins_anew(tiny: Tiny) -> None:
    failing = tiny.pipe.transformer.proj_out.register_forward_pre_hook(stop_at(6))
    with pytest.raises(StopError):
        tiny.run()
    failing.remove()
    assert torch.equal(tiny.run(seed=3), fresh(stream=tiny.stream, seed=3))


def stop_at(count: int) -> Any:
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) > count:
            raise StopError

    return hook


def image_to_image(tiny: Tiny, *, own_scheduler: bool = True) -> Tiny:
    """A pipeline from images on the same transformer."""
    scheduler = tiny.pipe.scheduler
    pipe = diffusers.FluxImg2ImgPipeline(
        type(scheduler).from_config(scheduler.config) if own_scheduler else scheduler,
        None, None, None, None, None, tiny.pipe.transformer,
    )  # fmt: skip
    return Tiny(pipe, {**tiny.inputs, "image": IMAGE, "latents": noise(1, 16, 4, seed=7), "strength": 0.5})


def fresh_from_image(stream: str) -> torch.Tensor:
    other = image_to_image(flux())
    enable(other.pipe, "paper", stream=stream)
    latents = other.run()
    told = report(other.pipe)["transformer"]
    begin = told.computed[0]
    assert begin == 6 == told.steps
    assert told.computed == tuple(begin + step for step in paper_schedule(6).computed)
    assert told.forecasts == 1 == len(told.forecast)
    return latents


@pytest.mark.parametrize("own_scheduler", [True, False])
def test_two_pipelines_take_turns_on_one_transformer(tiny: Tiny, own_scheduler: bool) -> None:
    other = image_to_image(tiny, own_scheduler=own_scheduler)
    enable(other.pipe, "paper", stream=tiny.stream)
    for _ in range(2):
        assert torch.equal(tiny.run(), fresh(stream=tiny.stream))
        assert torch.equal(other.run(), fresh_from_image(tiny.stream))
        with pytest.raises(StopError):
            tiny.run(callback_on_step_end=stopping(5))
        assert torch.equal(other.run(), fresh_from_image(tiny.stream))


def test_two_pipelines_may_interleave(tiny: Tiny) -> None:
    other, found = image_to_image(tiny), []
    enable(other.pipe, "paper", stream="velocity")
    enable(tiny.pipe, "paper", stream="velocity")

    def callback(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 8:
            found.append(other.run())
        return values

    found.append(tiny.run(callback_on_step_end=callback))
    assert torch.equal(found[0], fresh_from_image("velocity"))
    told = report(tiny.pipe)["transformer"]  # the end of the other took the histories with it
    assert (told.computed, told.forecast, told.unknown) == ((9, 10, 11), (), 0)


@pytest.mark.parametrize("at", [1, 5, 6])
def test_calls_of_a_pipeline_that_was_not_enabled_are_computed(
    tiny: Tiny, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    other = image_to_image(tiny)
    plain = image_to_image(flux()).run()
    tiny.run()
    assert torch.equal(other.run(), plain)
    assert "call enable() with every pipeline" in caplog.text
    with pytest.raises(StopError):
        tiny.run(callback_on_step_end=stopping(at))  # the scheduler has made a step: another is due
    assert torch.equal(other.run(), plain)
    assert report(tiny.pipe)["transformer"].unknown >= 6
    assert torch.equal(tiny.run(), fresh(stream=tiny.stream))


def test_a_prompt_that_changes_midway_is_computed(tiny: Tiny) -> None:
    changed = noise(1, TEXT, 32, seed=9)

    def callback(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": changed} if step == 8 else {}

    tiny.run(callback_on_step_end=callback)
    told = report(tiny.pipe)["transformer"]
    assert told.restarts == 1
    assert told.forecast == (5, 7, 9, 10)
    assert (told.evaluations, told.forecasts) == (told.nfe + 1, 3)


@STREAMS
def test_experts_have_schedules_of_their_own(stream: str) -> None:
    tiny = wan(transformer_2=wan_transformer(), boundary_ratio=0.9)
    plain = tiny.run(20)
    enable(tiny.pipe, "off", stream=stream)
    assert torch.equal(tiny.run(20), plain)
    enable(tiny.pipe, "paper", stream=stream)
    latents = [tiny.run(20) for _ in range(2)]
    assert torch.equal(*latents)
    high, low = report(tiny.pipe)["transformer"], report(tiny.pipe)["transformer_2"]
    begin = low.computed[0]
    assert sorted(high.computed + high.forecast) == list(range(begin)) and 3 < begin < 15
    assert low.steps == 20 - begin
    assert low.computed == tuple(begin + step for step in paper_schedule(20 - begin).computed)
    for told in (high, low):
        assert (told.evaluations, told.forecasts) == (2 * len(told.computed), 2 * len(told.forecast))


def test_experts_may_go_on_with_each_other_s_history() -> None:
    tiny = wan(transformer_2=wan_transformer(), boundary_ratio=0.9)
    parts = [tiny.pipe.transformer.blocks[0].attn1, tiny.pipe.transformer_2.blocks[0].attn1]
    ran = Evaluations(parts)
    tiny.run(20)
    calls = ran.counts[0]  # of the first expert: two a step
    preset = Preset(
        "carried",
        lambda steps: FixedSchedule.explicit(steps, [0, 1, 3, 19]),
        lambda steps: LinearExtrapolation(),
        "velocity",
        carried=True,
    )
    enable(tiny.pipe, preset)
    ran.counts[:] = 0, 0
    latents = tiny.run(20)
    assert 8 < calls < 38 and ran.counts == [6, 2]  # none for the second one's first steps
    high, low = report(tiny.pipe).values()
    assert high == low and high.computed == (0, 1, 3, 19) and len(high.forecast) == 16
    assert torch.equal(tiny.run(20), latents)
    with pytest.raises(ValueError, match="features of two transformers have nothing in common"):
        dataclasses.replace(preset, stream="feature")


@STREAMS
def test_branches_of_guidance_do_not_mix(stream: str) -> None:
    """Without contexts the order of calls tells them apart: as with contexts."""
    tiny = wan()
    enable(tiny.pipe, "paper", stream=stream)
    expected = tiny.run()
    alone = wan()
    enable(alone.pipe, "paper", stream=stream)
    alone.pipe.transformer.cache_context = no_context
    assert torch.equal(alone.run(), expected)


class no_context:  # noqa: N801
    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_a_unet_has_a_velocity_stream() -> None:
    tiny = stable_diffusion()
    plain = tiny.run(20)
    with pytest.raises(ValueError, match="blocks of UNet2DConditionModel are not known"):
        enable(tiny.pipe)
    enable(tiny.pipe, "off")
    assert torch.equal(tiny.run(20), plain)
    enable(tiny.pipe, stream="velocity")
    assert torch.equal(tiny.run(20), tiny.run(20))
    told = report(tiny.pipe)["unet"]
    assert (told.computed, told.forecasts) == (paper_schedule(20).computed, len(told.forecast))


@STREAMS
def test_tokens_may_have_timesteps_of_their_own(stream: str) -> None:
    tiny = wan(expand_timesteps=True)
    enable(tiny.pipe, "off")
    plain = tiny.run()
    disable(tiny.pipe)
    assert torch.equal(tiny.run(), plain)
    enable(tiny.pipe, "paper", stream=stream)
    tiny.run()
    told = report(tiny.pipe)["transformer"]
    assert (told.computed, told.forecasts) == (paper_schedule(12).computed, 2 * len(told.forecast))


@pytest.mark.parametrize("schedule", [{"kind": "paper"}, {"kind": "error", "tolerance": 1e9}])
def test_histories_are_given_up_when_no_forecast_can_follow(schedule: dict[str, Any]) -> None:
    held = []
    preset = Preset.load({"stream": "velocity", "schedule": schedule})
    generation = Generation(preset, total=12, begin=0)
    for step in range(12):
        call = Call(None, None, None, (), (), torch.tensor(12.0 - step))
        turn = generation.turn(call, step)
        assert turn is not None
        if turn.forecasts:
            turn.value()
        elif turn.records:
            turn.record(torch.ones(2))
        held.append(generation.bytes)
    last = max(generation.counts.forecast)
    assert all(held[:last]) and not any(held[last:])


def test_a_scheduler_that_does_not_count_is_counted_for() -> None:
    tiny = cogvideox()
    assert not hasattr(tiny.pipe.scheduler, "step_index")
    enable(tiny.pipe, "paper")
    first = tiny.run(20)
    assert report(tiny.pipe)["transformer"].computed == paper_schedule(20).computed
    with pytest.raises(StopError):
        tiny.run(callback_on_step_end=stopping(7))
    assert torch.equal(tiny.run(20), first)


@STREAMS
def test_batches_may_lose_a_branch_midway(stream: str) -> None:
    """Guidance that ends early, in a pipeline that has both branches in one batch."""
    tiny = sd3()
    enable(tiny.pipe, "paper", stream=stream)

    def callback(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step != 7:
            return values
        pipe._guidance_scale = 1.0
        return {name: value.chunk(2)[-1] for name, value in values.items()}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    latents = tiny.run(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert torch.isfinite(latents).all() and report(tiny.pipe)["transformer"].restarts == 1
    disable(tiny.pipe)
