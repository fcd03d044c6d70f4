"""A calibration of a model of two experts: over both, and bound to the boundary and the sampler's shift."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import load_calibration
from runtime.measure.calibrate import Calibrator
from runtime.media.mp4 import FrameBuffer
from runtime.profile import ModelProfile
from runtime.request.config import Config
from runtime.request.sampler import SamplerConfig
from runtime.request.video_request import VideoRequest
from spectrum import StepKind
from tests.conditioned import config_of, write_two_experts

STEPS = 10
Ask = Callable[..., VideoRequest]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_experts("WanPipeline", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two(config: Config, folder: Path) -> Engine:
    choice = SamplerConfig(kind="unipc", shift=12.0)
    return Engine(config_of(config, folder).model_copy(update={"scheduler": choice}))


@pytest.fixture(scope="module")
def ask(two: Engine) -> Ask:
    def make(**fields: object) -> VideoRequest:
        given = {"width": 64, "height": 48, "frames": 5, "steps": STEPS, "max_sequence_length": 32}
        given |= {"guidance": 4.0, "guidance_2": 2.5, "spectrum": "off"}
        return two.config.request("a red circle", **{**given, **fields})

    return make


@pytest.fixture(scope="module")
def calibration(two: Engine, ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "two.json"
    requests = [ask(seed=seed) for seed in range(2)]
    calibrator = Calibrator(two, requests, path.with_suffix(".partial"), fitted=())
    calibrator.run().write(path)
    return path


def preset(calibration: Path, stream: str, more: str = "", nfe: int = 5) -> str:
    path = calibration.with_name(f"{stream}-{nfe}-{len(more)}.yaml")
    path.write_text(
        f"stream: {stream}\nschedule: {{kind: planned, nfe: {nfe}, guard: null}}\n"
        f"predictor: {{kind: calibrated}}\ncalibration: {calibration}\n{more}"
    )
    return str(path)


def test_a_plan_is_made_for_both_experts(two: Engine, ask: Ask, calibration: Path) -> None:
    """Outputs are carried, and planned as one curve; features begin anew, within the same budget."""
    made = load_calibration(str(calibration))
    assert (made.conditions.guidance_2, made.conditions.boundary) == (2.5, 875.0)
    switch = two.plan(ask()).course.numbers.index(1)
    assert 2 < switch < STEPS - 2
    for stream, more, fresh in (
        ("guided", "", {}),
        ("guided", "switch: {history: fresh}\n", {switch: 2}),
        ("feature", "switch: {warmup: 1}\n", {switch: 1}),
    ):
        request = ask(spectrum=preset(calibration, stream, more), seed=7)
        result = two.generate(request, [FrameBuffer()])
        plan = made.planner(stream, fresh).plan(5)
        assert result.plan.fresh == fresh
        assert result.computed["cond"] == result.computed["uncond"] == list(plan.computed)
        kinds = enumerate(result.plan.kinds)
        assert tuple(step for step, kind in kinds if kind is StepKind.COMPUTE) == plan.computed
        expected = {step: error for step, error in enumerate(plan.errors) if error is not None}
        assert result.expectation.errors == expected


def test_a_budget_that_begins_no_history_is_refused(two: Engine, ask: Ask, calibration: Path) -> None:
    request = ask(spectrum=preset(calibration, "guided", "switch: {history: fresh, warmup: 3}\n", nfe=3))
    with pytest.raises(BadRequestError, match="nfe must be within 4"):
        two.plan(request)


def test_it_is_for_one_boundary_one_shift_and_both_scales(
    two: Engine, config: Config, ask: Ask, calibration: Path, tmp_path: Path
) -> None:
    spectrum = preset(calibration, "guided")
    two.profile.check(ask(spectrum=spectrum))
    with pytest.raises(BadRequestError, match=r"it is for guidance_2 2\.5, not 3\.0"):
        two.profile.check(ask(spectrum=spectrum, guidance_2=3.0))
    with pytest.raises(BadRequestError, match=r"it is for guidance_2 2\.5, not 4\.0"):
        two.profile.check(ask(spectrum=spectrum, guidance_2=None))
    other = two.config.model_copy(update={"scheduler": SamplerConfig(kind="unipc", shift=5.0)})
    with pytest.raises(BadRequestError, match=r"sampler\.flow_shift 12\.0, not 5\.0"):
        ModelProfile(other).check(ask(spectrum=spectrum))
    moved = write_two_experts("WanPipeline", tmp_path / "moved", boundary=0.9)
    index = json.loads((moved / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.9
    with pytest.raises(BadRequestError, match=r"boundary 875\.0, not 900\.0"):
        ModelProfile(two.config.model_copy(update={"model": str(moved)})).check(ask(spectrum=spectrum))
