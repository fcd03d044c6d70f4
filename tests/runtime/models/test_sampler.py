"""Samplers by name, and by what they can do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from runtime.errors import BadRequestError
from runtime.models.folder import find_model
from runtime.models.sampler import begin_sampler, load_sampler
from runtime.profile import ModelProfile
from runtime.request.config import EMBEDDED_MODELS, Config
from runtime.request.sampler import SamplerConfig

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0}


@pytest.mark.parametrize(
    ("kind", "name"), [("unipc", "UniPC"), ("euler", "FlowMatchEuler"), ("dpm++", "DPMSolver")]
)
def test_samplers_of_one_shift_share_their_sigmas(config: Config, kind: str, name: str) -> None:
    sampler = load_sampler(find_model(config), SamplerConfig(kind=kind, shift=5.0))  # type: ignore[arg-type]
    assert type(sampler).__name__.startswith(name)
    sampler.set_timesteps(10)
    assert len(sampler.timesteps) == 10
    assert float(sampler.sigmas[0]) == pytest.approx(1.0, abs=0.01)
    assert float(sampler.sigmas[5]) == pytest.approx(5 * 0.5 / (1 + 4 * 0.5), abs=0.05)


def named(config: Config, tmp_path: Path, **settings: Any) -> SchedulerMixin:
    """The sampler of a model whose settings are these."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return load_sampler(replace(find_model(config), path=tmp_path), SamplerConfig())


OLD_PUBLIC = {  # as diffusers 0.33 wrote it beside Wan2.1: five keys are newer
    "_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.33.0.dev0", "beta_end": 0.02,
    "beta_schedule": "linear", "beta_start": 0.0001, "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero", "flow_shift": 3.0, "lower_order_final": True, "num_train_timesteps": 1000,
    "predict_x0": True, "prediction_type": "flow_prediction", "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0, "solver_order": 2, "solver_p": None, "solver_type": "bh2", "steps_offset": 0,
    "thresholding": False, "timestep_spacing": "linspace", "trained_betas": None, "use_beta_sigmas": False,
    "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False,
}  # fmt: skip
UNIPC = {"_class_name": "UniPCMultistepScheduler", **FLOW}


@pytest.mark.parametrize(
    "settings",
    [
        OLD_PUBLIC,
        UNIPC | {"sigma_max": 14.0, "shift_terminal": 0.02},  # numbers, though diffusers writes `bool`
        {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3},
        {"_class_name": "DPMSolverSinglestepScheduler", **FLOW},
        {"_class_name": "DEISMultistepScheduler", **FLOW},  # ends before the clean sample
    ],
)
def test_a_model_may_bring_any_sampler_for_flow_matching(
    config: Config, tmp_path: Path, settings: dict[str, Any]
) -> None:
    sampler = named(config, tmp_path, **settings)
    assert type(sampler).__name__ == settings["_class_name"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "needs `mu`"),
        (UNIPC | {"use_dynamic_shifting": True}, "use_dynamic_shifting: true given"),
        (UNIPC | {"use_exponential_sigmas": True}, "is not finite"),
        (UNIPC | {"use_beta_sigmas": True, "use_karras_sigmas": True}, "use_beta_sigmas"),
        (UNIPC | {"flow_shift": "3.0"}, "flow_shift: '3.0' given; it must be a number"),
        (UNIPC | {"flow_shift": 0}, "flow_shift: 0 given; it must be above 0"),
        (UNIPC | {"flow_shift": float("nan")}, "flow_shift: nan given"),
        (UNIPC | {"disable_corrector": 5}, "disable_corrector: 5 given; it must be a list"),
        (UNIPC | {"num_train_timesteps": 0}, "num_train_timesteps: 0 given"),
        (UNIPC | {"use_flow_sigmas": False, "prediction_type": "epsilon"}, "not sample flow matching"),
        ({"_class_name": "EulerDiscreteScheduler"}, "not sample flow matching"),
        ({"_class_name": "DDIMScheduler"}, "no attribute 'set_begin_index'"),
        ({"_class_name": "DDPMScheduler"}, "no attribute 'set_begin_index'"),
        ({"_class_name": "SASolverScheduler", **FLOW}, "adds noise at its steps"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "adds noise at its steps"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", **FLOW, "algorithm_type": "sde-dpmsolver++"},
            "adds noise at its steps",
        ),
        ({"_class_name": "WanPipeline"}, "diffusers has no such sampler"),
        ({"_class_name": "AutoencoderKLWan"}, "diffusers has no such sampler"),
        ({"_class_name": 5}, "diffusers has no such sampler"),
        ({}, "diffusers has no such sampler"),
    ],
)
def test_what_cannot_sample_is_refused_by_name(
    config: Config, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadRequestError, match="cannot be used: its sampler") as caught:
        named(config, tmp_path, **settings)
    assert f"its sampler {settings.get('_class_name')}: " in str(caught.value)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_sampler_with_a_setting_that_cannot_be_pickled_is_tried_each_time(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WarpedScheduler(FlowMatchEulerDiscreteScheduler):
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
            super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)
            self.register_to_config(warp=lambda sigma: sigma)

    monkeypatch.setattr(diffusers, "WarpedScheduler", WarpedScheduler, raising=False)
    assert type(named(config, tmp_path, _class_name="WarpedScheduler", shift=3.0)) is WarpedScheduler


def test_trying_a_sampler_draws_nothing_from_torch(config: Config, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    named(config, tmp_path, **UNIPC)
    assert torch.equal(before, torch.random.get_rng_state())


def test_steps_that_a_sampler_cannot_take_are_refused(config: Config, tmp_path: Path) -> None:
    sampler = named(config, tmp_path, _class_name="DPMSolverSinglestepScheduler", **FLOW)
    with pytest.raises(BadRequestError, match="steps: 0 given; the sampler DPMSolverSinglestepScheduler"):
        begin_sampler(sampler, 0, None)


@pytest.mark.parametrize("name", ["", "_", "x"])
def test_a_setting_that_no_sampler_knows_does_no_harm(config: Config, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(EMBEDDED_MODELS / "wan-tiny", tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: "0.42.1"}))
    profile = ModelProfile(config.model_copy(update={"model": str(folder)}))
    profile.check(config.request("a red circle", steps=4))
