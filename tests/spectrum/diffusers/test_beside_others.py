"""Beside what else is done with a transformer: offloading, copies, threads and gradients."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from spectrum import paper_schedule
from spectrum.diffusers import disable, enable, report
from tests.pipelines import Tiny, flux, noise, stable_diffusion
from tests.spectrum.diffusers.test_forecasts import flux_call, preset
from tests.spectrum.diffusers.test_generations import STREAMS, fresh

COMPUTED = paper_schedule(12).computed


@STREAMS
@pytest.mark.parametrize("before", [True, False])
def test_offloading_is_put_on_anew_after_every_generation(before: bool, stream: str) -> None:
    tiny = flux()
    if before:
        tiny.pipe.enable_model_cpu_offload(device="cpu")
    enable(tiny.pipe, "paper", stream=stream)
    if not before:
        tiny.pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(tiny.run(), fresh(stream=stream))
        assert report(tiny.pipe)["transformer"].computed == COMPUTED
    disable(tiny.pipe)
    assert torch.equal(tiny.run(), flux().run())
    assert hasattr(tiny.pipe.transformer, "_hf_hook")


class Counting(ModelHook):
    """A hook of accelerate."""

    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_hooks_of_accelerate_outlive_disable() -> None:
    tiny, hook = flux(), Counting()
    enable(tiny.pipe)
    add_hook_to_module(tiny.pipe.transformer, hook)
    tiny.run()
    disable(tiny.pipe)
    tiny.run()
    assert hook.calls == 2 * 12


@STREAMS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied: Callable[[Any], Any], stream: str) -> None:
    tiny = flux()
    enable(tiny.pipe, stream=stream)
    with pytest.raises(TypeError, match=r"neither be copied nor pickled; call spectrum.diffusers.disable"):
        copied(tiny.pipe.transformer)
    disable(tiny.pipe)
    copied(tiny.pipe.transformer)


@STREAMS
def test_two_threads_share_a_transformer(stream: str) -> None:
    tiny = flux()
    scheduler = type(tiny.pipe.scheduler).from_config(tiny.pipe.scheduler.config)
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, tiny.pipe.transformer)
    other = Tiny(pipe, tiny.inputs)
    for one in (tiny, other):
        enable(one.pipe, "paper", stream=stream)
    found: dict[str, torch.Tensor] = {}
    meet = threading.Barrier(2, timeout=60)

    def later() -> None:
        found["other"] = other.run(seed=5, callback_on_step_end=wait)

    def wait(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step < 11:
            meet.wait()
        return values

    def begin(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            thread.start()
            return values
        return wait(pipe, step - 1, time, values)

    thread = threading.Thread(target=later)
    found["one"] = tiny.run(callback_on_step_end=begin)
    thread.join()
    assert torch.equal(found["one"], fresh(stream=stream))
    assert torch.equal(found["other"], fresh(stream=stream, seed=5))


@STREAMS
def test_what_needs_a_gradient_is_computed(stream: str, caplog: pytest.LogCaptureFixture) -> None:
    model = flux().pipe.transformer
    expected = [flux_call(model, step) for step in range(4)]
    enable(model, preset(stream), steps=4)
    found = [flux_call(model, step) for step in range(4)]
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))
    found[3].sum().backward()
    assert model.x_embedder.weight.grad is not None
    assert "call it within torch.no_grad()" in caplog.text


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (diffusers.DDIMScheduler(), 12),
        (diffusers.PNDMScheduler(skip_prk_steps=True), 13),  # has its second step twice
        (diffusers.HeunDiscreteScheduler(), 23),  # calls twice a step, but for the last
        (diffusers.KDPM2DiscreteScheduler(), 23),
    ],
)
def test_other_schedulers_have_forecasts(scheduler: Any, steps: int) -> None:
    tiny = stable_diffusion()
    tiny.pipe.scheduler = scheduler
    enable(tiny.pipe, stream="velocity")
    tiny.run()
    told = report(tiny.pipe)["unet"]
    assert (told.steps, told.unknown, told.restarts) == (steps, 0, 0)
    assert (told.evaluations, told.forecasts) == (steps - len(told.forecast), len(told.forecast))
    assert told.forecast == tuple(step for step in range(steps) if step not in paper_schedule(steps).computed)


def test_a_later_start_is_seen_where_the_scheduler_does_not_count() -> None:
    tiny = stable_diffusion()
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        None, None, None, tiny.pipe.unet, tiny.pipe.scheduler, None, None, requires_safety_checker=False
    )
    inputs = {name: value for name, value in tiny.inputs.items() if name not in ("height", "width")}
    other = Tiny(pipe, {**inputs, "image": noise(1, 4, 8, 8), "strength": 0.5})
    enable(pipe, stream="velocity")
    other.run(20)
    told = report(pipe)["unet"]
    assert (told.steps, told.unknown) == (10, 0)
    assert told.computed == tuple(10 + step for step in paper_schedule(10).computed)
