"""Models of few steps: the config lists their noise levels, or timesteps, and nothing else is sampled."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from pydantic import ValidationError

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.media.mp4 import FrameBuffer
from runtime.profile import ModelProfile
from runtime.request.config import Config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from runtime.sampling.denoise import StepRecord
from tests.conditioned import EXPERTS, config_of, write_two_experts
from tests.stopping import stop_and_resume

SIGMAS, SHIFT = (1.0, 0.75, 0.5, 0.25), 5.0
TIMESTEPS = (999, 934, 862, 756, 603, 410, 250, 140, 74)


def listing(config: Config, **scheduler: Any) -> Config:
    """A config whose scheduler lists its steps."""
    choice = SamplerConfig(**scheduler)
    assert choice.steps is not None
    defaults = config.defaults.model_copy(
        update={
            "steps": choice.steps,
            "guidance": 1.0,
            "spectrum": "off",
            "width": 48,
            "height": 48,
            "frames": 5,
        }
    )
    return Config.model_validate(
        {**config.model_dump(), "scheduler": choice, "defaults": defaults.model_dump()}
    )


@pytest.fixture(scope="module")
def four(config: Config) -> Config:
    return listing(config, kind="euler", shift=SHIFT, sigmas=SIGMAS)


def asked(config: Config, **fields: Any) -> VideoRequest:
    return config.request("a red circle", **{"seed": 2, **fields})


@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_listed_noise_levels_are_set_as_diffusers_sets_them(config: Config, kind: str) -> None:
    own = listing(config, kind=kind, shift=SHIFT, sigmas=SIGMAS)
    sampler = ModelProfile(own).fresh_sampler(asked(own))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}
    theirs: Any = (
        FlowMatchEulerDiscreteScheduler(shift=SHIFT) if kind == "euler" else UniPCMultistepScheduler(**flow)
    )
    theirs.set_timesteps(sigmas=np.array(SIGMAS))
    assert torch.equal(sampler.timesteps, theirs.timesteps)
    assert torch.equal(sampler.sigmas, theirs.sigmas)


def test_four_steps_are_those_that_lightx2v_distils_for(four: Config) -> None:
    """Timesteps 1000, 937.5, 833.3 and 625; each step goes straight to the next noise level."""
    sampler = ModelProfile(four).fresh_sampler(asked(four))
    assert sampler.timesteps.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    levels = [SHIFT * sigma / (1 + (SHIFT - 1) * sigma) for sigma in (*SIGMAS, 0.0)]
    numbers = torch.Generator().manual_seed(0)
    latents = mine = torch.randn(2, 3, generator=numbers)
    for step, timestep in enumerate(sampler.timesteps):
        velocity = torch.randn(latents.shape, generator=numbers)
        latents = latents - levels[step] * velocity + levels[step + 1] * velocity
        mine = sampler.step(velocity, timestep, mine, return_dict=False)[0]
        assert torch.allclose(mine, latents, atol=1e-6)


def test_listed_timesteps_are_what_the_transformer_sees(config: Config) -> None:
    own = listing(config, kind="euler", timesteps=TIMESTEPS)
    sampler = ModelProfile(own).fresh_sampler(asked(own))
    assert sampler.timesteps.tolist() == list(TIMESTEPS)
    assert torch.allclose(sampler.sigmas, torch.tensor([*TIMESTEPS, 0]) / 1000)


@pytest.mark.parametrize("kind", ["euler", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_frames_are_the_pipelines_with_the_same_list(config: Config, kind: str, guidance: float) -> None:
    engine = Engine(listing(config, kind=kind, shift=SHIFT, sigmas=SIGMAS))
    request = asked(engine.config, guidance=guidance)
    pipeline = WanPipeline.from_pretrained(engine.model.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(engine.profile.sampler).from_config(engine.profile.sampler.config)
    pipeline.scheduler.set_timesteps = partial(pipeline.scheduler.set_timesteps, sigmas=np.array(SIGMAS))
    theirs = pipeline(
        prompt=request.prompt, negative_prompt="", height=48, width=48, num_frames=5, num_inference_steps=4,
        guidance_scale=guidance, output_type="np", generator=torch.Generator("cpu").manual_seed(2),
    ).frames[0]  # fmt: skip
    sink = FrameBuffer()
    result = engine.generate(request, [sink])
    assert np.array_equal(sink.frames, (theirs * 255).round().astype(np.uint8))
    assert result.nfe == 4


def test_two_experts_share_the_list_and_resume_to_the_bit(config: Config, tmp_path: Path) -> None:
    own = listing(
        config_of(config, write_two_experts("WanPipeline", tmp_path / "two")),
        kind="euler", shift=SHIFT, sigmas=SIGMAS,
    )  # fmt: skip
    engine = Engine(own)
    course = engine.plan(asked(own)).course
    assert [course.name(step) for step in range(4)] == [EXPERTS[0]] * 2 + [EXPERTS[1]] * 2
    found = stop_and_resume(engine.ranks, own, asked(own), tmp_path / "kept", [0])
    assert found == [(3, True, True)]


def test_a_warm_up_is_the_first_of_the_listed_steps(four: Config) -> None:
    engine, shown = Engine(four), list[StepRecord]()
    plan = engine.plan(asked(four))
    module = engine.loaded.experts[0].module
    calls: list[int] = []
    module.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    engine.warm_up(plan)
    assert calls == [1]
    engine.run(plan, [FrameBuffer()], shown.append)
    assert len(shown) == 4 and len(calls) == 5


def test_the_list_is_what_a_video_is_a_function_of(config: Config, four: Config) -> None:
    profiles = [ModelProfile(four), ModelProfile(listing(config, kind="euler", shift=SHIFT, sigmas=(1, 0.5)))]
    recipes, conditions = [], []
    for profile in profiles:
        request = asked(profile.config)
        preset = profile.check(request)
        recipes.append(profile.recipe(request, preset, None).parts["sampler"])
        conditions.append(profile.conditions(request, profile.fresh_sampler(request)).settings)
    assert recipes[0] != recipes[1] and recipes[0]["sigmas"] == "[1.0, 0.75, 0.5, 0.25]"
    assert conditions[0]["sigmas"] != conditions[1]["sigmas"]


def test_another_number_of_steps_is_refused(four: Config) -> None:
    said = "steps: 8 given; the config's scheduler lists the sigmas of 4"
    with pytest.raises(BadRequestError, match=said):
        asked(four, steps=8)
    beside = asked(four).model_copy(update={"steps": 8})
    with pytest.raises(BadRequestError, match=said):
        ModelProfile(four).check(beside)
    defaults = four.defaults.model_copy(update={"steps": 50}).model_dump()
    with pytest.raises(ValidationError, match=r"defaults\.steps: 50 given; .* sigmas of 4"):
        Config.model_validate({**four.model_dump(), "defaults": defaults})


def test_four_steps_leave_nothing_to_forecast_from(config: Config, four: Config) -> None:
    with pytest.raises(
        BadRequestError, match="spectrum: 'paper' given; a model of 4 steps has too few steps"
    ):
        ModelProfile(four).check(asked(four, spectrum="paper"))
    nine = listing(config, kind="euler", timesteps=TIMESTEPS)
    plan = Engine(nine).plan(asked(nine, spectrum="paper"))
    assert 0 < sum(kind.value == "forecast" for kind in plan.kinds) < 9


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"kind": "euler", "sigmas": (0.5, 0.75)}, "sigmas: must be in descending order"),
        ({"kind": "euler", "sigmas": (0.5, 0.5)}, "sigmas: must be in descending order"),
        ({"kind": "euler", "sigmas": (1.5, 0.5)}, "less than or equal to 1"),
        ({"kind": "euler", "sigmas": (1.0, 0.0)}, "greater than 0"),
        ({"kind": "euler", "sigmas": ()}, "at least 1 item"),
        ({"kind": "euler", "timesteps": (1001, 5)}, "less than or equal to 1000"),
        ({"kind": "euler", "timesteps": (999, 5), "sigmas": (1.0, 0.5)}, "sigmas and timesteps are given"),
        ({"kind": "euler", "timesteps": (999, 5), "shift": 3.0}, "shift: 3 given; it has no effect"),
        ({"kind": "unipc", "timesteps": (999, 5)}, "kind: 'unipc' given; timesteps need .*: euler"),
        ({"kind": "dpm++", "sigmas": (1.0, 0.5)}, "kind: 'dpm.*' given; sigmas need .*: unipc or euler"),
        ({"sigmas": (1.0, 0.5)}, "kind: 'model' given; sigmas need .*: unipc or euler"),
    ],
)
def test_a_list_that_is_none_is_refused(scheduler: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        SamplerConfig(**scheduler)
