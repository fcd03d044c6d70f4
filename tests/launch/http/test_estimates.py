"""`POST /v1/videos/estimate`: what is told before a video is made is what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.methods import Methods
from tests.serving import SMALL, Api, error_of, serving

USUAL = {"prompt": "a red circle"}  # at the model's defaults, for which it is calibrated


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def estimate(api: Api, **fields: Any) -> dict[str, Any]:
    answer = api.client.post("/v1/videos/estimate", json=fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_it_tells_what_the_video_would_be_and_keeps_nothing(api: Api) -> None:
    told = estimate(api, prompt="a", seconds="1.5", size="64x48", spectrum="paper")
    assert (told["frames"], told["seconds"], told["fps"], told["size"]) == (13, "1.625", 8, "64x48")
    assert told["nfe"] == len(told["computed"]) == 14 and told["computed"][0] == 0 and not told["exact"]
    assert api.client.get("/v1/videos").json()["data"] == []
    assert not any(api.queue.count().values())


def test_the_full_sampler_is_exact_and_computes_every_step(api: Api) -> None:
    told = estimate(api, **SMALL)
    assert told["exact"] and told["computed"] == [0, 1, 2, 3] and told["psnr"] is None


def test_budgets_are_priced_by_the_calibration(api: Api) -> None:
    methods = Methods(load_calibration("wan-tiny"))
    fitted, prediction = methods.best(10), methods.best(10).prediction
    assert fitted.method == "fitted" and prediction is not None
    ten = estimate(api, **USUAL, nfe=10)
    assert ten["nfe"] == 10
    assert ten["psnr"] == {
        "expected": round(prediction.psnr, 2),
        "deviation": round(prediction.deviation, 2),
    }
    assert estimate(api, **USUAL, spectrum="best-10")["computed"] == ten["computed"]
    planned = methods.best(25).prediction  # for which no solver is fitted
    assert planned is not None
    assert estimate(api, **USUAL, nfe=25)["psnr"]["expected"] == round(planned.psnr, 2)
    assert estimate(api, **USUAL, psnr=45)["psnr"]["expected"] >= 45


def test_time_is_the_calibrations_until_the_server_has_measured_its_own(api: Api) -> None:
    calibration = load_calibration("wan-tiny").seconds
    before = estimate(api, **USUAL, nfe=10)["time"]
    assert before["source"] == "calibration" and before["total"] is None
    assert before["denoise"] == round(10 * calibration.computed + 40 * calibration.forecast, 3)
    size = {"size": None, "frames": None, "steps": None}
    for computed in (2.0, 3.0, 40.0):
        id = api.create(**size)["id"]
        api.finish()
        _write_report(api, id, computed)
    after = estimate(api, **USUAL, nfe=10)["time"]
    assert after == {"denoise": 10 * 3.0 + 40 * 0.5, "total": 10 * 3.0 + 40 * 0.5 + 4.0, "source": "measured"}
    assert estimate(api, **USUAL, nfe=10, deadline=7)["time"]["denoise"] == 7
    other = estimate(api, **USUAL, nfe=10, frames=13)["time"]  # near enough to the calibration, not measured
    assert other is not None and other["source"] == "calibration"
    long = estimate(api, **USUAL, nfe=10, frames=33)["time"]  # three windows of the 17 frames that it is for
    assert long["denoise"] == pytest.approx(3 * before["denoise"], rel=1e-3)
    assert estimate(api, **SMALL)["time"] is None


def _write_report(api: Api, id: str, computed: float) -> None:
    told = {
        "step_seconds": {"computed_median": computed, "forecast_median": 0.5},
        "seconds": {"encode": 1.0, "decode": 2.0, "write": 1.0},
        "request": {"image": None},
        "windows": 1,
    }
    api.service.store.video(id).with_suffix(".json").write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": "a", "model": "other"}, 404, "model_not_found", "model"),
        ({"prompt": "a", "size": "63x48"}, 400, "invalid_value", "size"),
        ({"prompt": "a", "nfe": 10, "steps": 20}, 400, "invalid_value", "nfe"),
        ({"prompt": "a", "psnr": 99}, 400, "invalid_value", "psnr"),
        ({"prompt": "a", "path": "/etc"}, 400, "unknown_parameter", "path"),
    ],
)
def test_it_refuses_what_a_new_video_is_refused_for(
    api: Api, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    assert error_of(api.client.post("/v1/videos/estimate", json=fields)) == (status, code, param)
    assert error_of(api.client.post("/v1/videos", json=fields)) == (status, code, param)
