"""Solvers of a model with two experts, whose guidance is an input: there is one branch, and one value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.forecasting.calibration import Calibration
from runtime.measure.calibrate import Calibrator
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.request.video_request import VideoRequest
from runtime.sampling.result import Result
from tests.family import toy_config, write_toy

Made = tuple[Engine, list[VideoRequest], Calibration, Path]
FITTED = (4, 6)


@pytest.fixture(scope="module", params=["fresh", "carried"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("toy")
    engine = Engine(toy_config(write_toy(folder / "model", request.param)))
    requests = [engine.config.request(f"a red circle {n}", seed=n, spectrum="off") for n in range(3)]
    calibration = Calibrator(engine, requests, folder / "a.partial", fitted=FITTED).run()
    calibration.write(folder / "a.json")
    return engine, requests, calibration, folder


def generate(engine: Engine, request: VideoRequest) -> tuple[Result, Frames]:
    sink = FrameBuffer()
    return engine.generate(request, [sink]), sink.frames


def preset(folder: Path, nfe: int, more: str = "") -> str:
    path = folder / f"{nfe}{len(more)}.yaml"
    path.write_text(
        f"stream: guided\nschedule: {{kind: fitted, nfe: {nfe}{more}}}\npredictor: {{kind: calibrated}}\n"
        "calibration: a.json\n"
    )
    return str(path)


def test_each_expert_has_nodes_and_no_warm_up(made: Made) -> None:
    """Whatever becomes of histories at the switch: a solver has none, and begins nothing anew."""
    engine, requests, calibration, folder = made
    course = engine.plan(requests[0]).course
    fresh = "fresh" in folder.joinpath("model/model_index.json").read_text()
    assert len(course.forced(outputs=True)) == (2 if fresh else 0)
    for fit in calibration.fits:
        assert fit.branches == 1
        assert {course.numbers[node] for node in fit.nodes} == {0, 1}
        request = requests[0].model_copy(update={"spectrum": preset(folder, fit.nfe), "seed": 9})
        result, frames = generate(engine, request)
        assert result.computed["cond"] == fit.nodes and result.expectation.handed_over is None
        assert result.errors.keys() == set(fit.nodes[1:])
        assert np.isfinite(frames).all()


def test_more_nodes_come_closer(made: Made) -> None:
    _, _, calibration, _ = made
    few, many = ([trial.measured for trial in fit.trials] for fit in calibration.fits)
    assert np.mean(many) < np.mean(few)


def test_it_hands_over_before_and_after_the_second_expert(made: Made) -> None:
    """A guard that is never content adds steps in the first gaps; histories that are dropped, others."""
    engine, requests, calibration, folder = made
    nodes = calibration.fit(4).nodes
    request = requests[0].model_copy(update={"spectrum": preset(folder, 4, ", guard: 1.0e-6")})
    result, _ = generate(engine, request)
    added = result.expectation.added
    assert set(result.computed["cond"]) == {*nodes, *added}
    assert added and result.expectation.handed_over == min(added)
    dropping = Path(preset(folder, 4, ", guard: null"))
    dropping.write_text(dropping.read_text() + "switch: {history: fresh, warmup: 2}\n")
    request = requests[0].model_copy(update={"spectrum": str(dropping)})
    forced = engine.plan(request).forced
    result, frames = generate(engine, request)
    assert len(forced) == 2 and set(result.computed["cond"]) == {*nodes, *forced}
    assert result.expectation.handed_over == min(forced - {*nodes}) and np.isfinite(frames).all()


def test_too_few_nodes_for_the_experts_are_refused(made: Made, tmp_path: Path) -> None:
    engine, requests, _, _ = made
    with pytest.raises(BadRequestError, match="solvers of 12 steps compute 2 to 11 of them"):
        Calibrator(engine, requests, tmp_path / "p", fitted=[1])
