"""Which preset a request gets that names none, and the reason that is told."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import BadRequestError
from runtime.forecasting.presets import Preset, load_preset
from runtime.forecasting.usual import FEW_STEPS, choose_preset, decided
from runtime.jobs.job import Job
from runtime.models.configs import open_config
from runtime.models.folder import local_revision
from runtime.profile import ModelProfile
from runtime.request.config import AUTO, Config, available, load_config
from runtime.request.outputs import Outputs
from runtime.request.sampler import SamplerConfig
from spectrum import StepKind

FITS = "calibrated for this model, sampler and size"
revision = cache(local_revision)


def nfe_and_psnr(preset: Preset, steps: int) -> tuple[int, float]:
    kinds = preset.expected_kinds(steps)
    computed = [step for step, kind in enumerate(kinds) if kind is StepKind.COMPUTE]
    return len(computed), preset.expectation(steps, computed, {}, {}, []).psnr or 0.0


@pytest.mark.parametrize(
    ("config", "given", "name", "reason"),
    [
        ("wan-tiny", {}, "best-14", FITS),
        ("wan-tiny", {"frames": 81}, "best-14", FITS),  # in windows of the calibrated length
        ("wan-tiny", {"steps": 20}, "universal", "no calibration fits: this model's is for steps 50, not 20"),
        (
            "wan-tiny",
            {"guidance": 1.0},
            "universal",
            "this model's is for guidance 5.0, not 1.0",
        ),
        (
            "wan-tiny",
            {"width": 256, "height": 256},
            "universal",
            "is for videos of about 96×96×17, not 256×256",
        ),
        ("wan2.2-tiny", {}, "best-experts-14", FITS),
        ("wan2.2-tiny", {"guidance_2": 3.0}, "universal", "this model's is for guidance_2 5.0, not 3.0"),
        ("wan-tiny", {"steps": 200}, "universal", "this model's is for steps 50, not 200"),
        ("wan-tiny", {"steps": 201}, "paper", "this model's is for steps 50, not 201"),  # too many to plan
        ("wan2.1-t2v-14b-480p", {}, "universal", "no calibration fits: none was made for this model"),
    ],
)
def test_the_best_calibrated_preset_that_fits_or_the_universal_one(
    config: str, given: dict[str, Any], name: str, reason: str
) -> None:
    settings = load_config(config)
    request, told = decided(settings, settings.request("x", **given), revision)
    assert request.spectrum == name
    assert reason in told


@pytest.mark.parametrize("config", ["wan-tiny", "wan2.2-tiny"])
def test_it_costs_no_more_than_the_papers_and_is_the_best_of_those(config: str) -> None:
    settings = load_config(config)
    request = settings.request("x")
    profile = ModelProfile(settings)
    chosen = load_preset(choose_preset(settings, request, revision).name)
    profile.check(request, chosen)  # as exactly as when it runs, its sampler included
    nfe, psnr = nfe_and_psnr(chosen, request.steps)
    assert nfe <= nfe_and_psnr(load_preset("paper"), request.steps)[0]
    for name in available("spectrum"):
        other = load_preset(name)
        try:
            profile.check(request, other)
        except BadRequestError:
            continue
        if other.calibrated is not None and nfe_and_psnr(other, request.steps)[0] == nfe:
            assert nfe_and_psnr(other, request.steps)[1] <= psnr


def never(config: Config) -> str:
    raise AssertionError("the model's files are not needed for this")


def test_what_no_calibration_can_be_of_is_decided_without_the_models_files(tmp_path: Path) -> None:
    tiny = load_config("wan-tiny")
    few = tiny.model_copy(
        update={"scheduler": SamplerConfig(kind="euler", sigmas=tuple(1 - i / 4 for i in range(FEW_STEPS)))}
    )
    chosen = choose_preset(few, tiny.request("x", steps=50), never)
    assert (chosen.name, chosen.reason) == ("off", "a model of 4 steps has too few steps to forecast from")
    with_lora = Config.model_validate(tiny.model_dump() | {"lora": {"file": "ink.safetensors"}})
    chosen = choose_preset(with_lora, tiny.request("x"), never)
    assert (chosen.name, chosen.reason) == (
        "universal",
        "no calibration fits: none was made with these LoRAs",
    )
    named = tiny.request("x", spectrum="paper-fast")
    assert decided(tiny, named, never) == (named, "")


def test_another_sampler_than_the_models_gets_the_universal_one() -> None:
    other = load_config("wan-tiny").model_copy(update={"scheduler": SamplerConfig(kind="unipc", shift=5.0)})
    chosen = choose_preset(other, other.request("x"), revision)
    assert chosen.name == "universal"
    assert chosen.reason == "no calibration fits: this model's is for its own sampler"


@pytest.mark.parametrize("name", available("."))
def test_every_shipped_config_leaves_the_choice_open_or_is_exact(name: str) -> None:
    config = load_config(name)
    assert config.defaults.spectrum == ("off" if config.scheduler.steps else AUTO)
    request, told = decided(config, config.request("x"), lambda _: None)
    load_preset(request.spectrum)
    assert bool(told) == (config.defaults.spectrum == AUTO)


def test_a_job_says_what_was_chosen_and_why_and_a_preset_called_auto_is_none(tmp_path: Path) -> None:
    config = open_config("wan-tiny")
    outputs = Outputs.named(tmp_path / "a.mp4")
    job = Job.build(config, config.request("x"), outputs)
    assert (job.request.spectrum, job.chosen) == ("best-14", FITS)
    assert job.preset == load_preset("best-14") and job.told == f"preset best-14 ({FITS})"
    assert Job.from_json(job.to_json()) == job
    named = Job.build(config, config.request("x", spectrum="paper"), outputs)
    assert (named.chosen, named.told) == ("", "preset paper")
    with pytest.raises(BadRequestError, match="'auto' given; it chooses a preset for a request"):
        load_preset(AUTO)
