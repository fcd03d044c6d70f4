"""Recipes: what a video is a function of is in them, what it is not is not, and changes are told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.job import Job
from runtime.jobs.run import run_job
from runtime.parallel.kernels import KERNELS, add_kernel
from runtime.profile import ModelProfile
from runtime.recipe import Recipe
from runtime.request.config import EMBEDDED_MODELS, Config, Dtypes, Tiles, Window
from runtime.request.memory import Memory
from runtime.request.outputs import Outputs
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from tests.jobs import job_of, make_job
from tests.places import ROOT

Small = Callable[..., VideoRequest]


def recipe_of(config: Config, request: VideoRequest) -> Recipe:
    profile = ModelProfile(config)
    return profile.recipe(request, profile.check(request), None)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": Dtypes(transformer="bfloat16")},
        {"scheduler": SamplerConfig(kind="euler")},
        {"scheduler": SamplerConfig(shift=7.0)},
        {"window": Window(frames=9, overlap=4)},
        {"attention": "sdpa"},
        {"compile": True},
        {"fuse_projections": True},
        {"fuse_forecasts": True},
        {"batch_guidance": "always"},
        {"batch_guidance": "auto"},
        {"quantization": "int8"},
        {"performance": "fast", "compile": False, "fuse_projections": False, "fuse_forecasts": False},
        {"tiles": Tiles()},
        {"decode": "tiles"},
        {"decode": "auto"},
        {"fps": 9},
    ],
    ids="-".join,
)
def test_what_makes_another_video_makes_another_recipe(
    config: Config, small: Small, change: dict[str, Any]
) -> None:
    request = small(frames=13)
    assert recipe_of(config.model_copy(update=change), request).digest != recipe_of(config, request).digest


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"memory": Memory(transformer="shard", history="offload")},
        {"busy_timeout": 7.0},
        {"decode": "whole"},
        {"decode": "halo"},
        {"window": Window(frames=81, overlap=16)},  # the video fits the model
    ],
    ids="-".join,
)
def test_what_makes_the_same_video_keeps_the_recipe(
    config: Config, small: Small, change: dict[str, Any]
) -> None:
    request = small()
    assert recipe_of(config.model_copy(update=change), request) == recipe_of(config, request)


def test_an_added_kernel_counts_by_its_code(config: Config, small: Small, tmp_path: Path) -> None:
    config = config.model_copy(update={"attention": "mine"})
    digests = []
    for number, scale in enumerate(("1.0", "2.0", "1.0")):
        file = tmp_path / f"version{number}" / "mine.py"
        file.parent.mkdir()
        file.write_text(f"def mine(query, key, value):\n    return {scale} * query, None\n")
        spec = spec_from_file_location("mine", file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        add_kernel("mine")(module.mine)
        try:
            digests.append(recipe_of(config, small()).digest)
        finally:
            del KERNELS["mine"]
    assert digests[0] == digests[2] != digests[1]


def test_tiles_are_no_part_of_the_latents(config: Config, small: Small) -> None:
    one, other = (recipe_of(config.model_copy(update={"tiles": t}), small()) for t in (None, Tiles()))
    assert one.digest != other.digest and one.latents.digest == other.latents.digest


def test_a_change_is_told_by_field_and_value(config: Config, small: Small) -> None:
    before, now = (recipe_of(config, small(seed=seed)) for seed in (7, 8))
    with pytest.raises(BadRequestError, match=r"seed was 7, now it is 8\. Submit the request again"):
        before.check_same(now)


def test_what_one_side_does_not_know_is_not_compared(config: Config, small: Small) -> None:
    whole = recipe_of(config, small())
    part = Recipe({name: value for name, value in whole.parts.items() if name != "model"})
    part.check_same(whole)
    whole.check_same(part)


def test_a_report_names_its_recipe(engine: Engine, small: Small, tmp_path: Path) -> None:
    outputs = Outputs.named(tmp_path / "a.mp4", None, overwrite=False)
    report = run_job(engine, job_of(engine, small(steps=2, spectrum="off"), outputs))
    assert report.recipe == recipe_of(engine.config, small(steps=2, spectrum="off")).digest


def test_a_job_whose_model_has_changed_since_is_refused(small: Small, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODELS / "wan-tiny", model)
    job = _job(tmp_path, model).planned()
    assert Job.from_json(job.to_json()).recipe == job.recipe
    settings = model / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace("}", "\n}"))
    engine = Engine(job.config)
    with pytest.raises(BadRequestError, match="changed since it was planned: model was 'sha256:"):
        run_job(engine, job)
    assert not job.outputs.video.exists()
    again = _job(tmp_path, model).planned()
    run_job(engine, again)
    assert again.outputs.video.exists()


def _job(tmp_path: Path, model: Path) -> Job:
    file = tmp_path / "tiny.yaml"
    tiny = (ROOT / "configs" / "wan-tiny.yaml").read_text(encoding="utf-8")
    file.write_text(tiny.replace("model: wan-tiny", f"model: {model}"), encoding="utf-8")
    return make_job(tmp_path / "video.mp4", config=str(file), steps=2, spectrum="off")
