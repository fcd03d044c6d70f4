"""Models, health and metrics: what a page and a monitor ask for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from launch.serve.entries import ReplicaEntry
from runtime.forecasting.calibration import load_calibration
from runtime.forecasting.methods import Methods
from tests.serving import Api, error_of, listening, serving


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with serving(tmp_path / "queue") as opened:
        yield opened


def test_models_tell_what_may_be_chosen_and_what_it_gives(api: Api) -> None:
    [model] = api.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("wan-tiny", "model")
    assert model["defaults"]["size"] == "96x96" and model["defaults"]["seconds"] == "2.125"
    presets = {one["id"]: one for one in model["presets"]}
    assert presets["off"]["nfe"] == 50 and presets["off"]["psnr"] is None
    assert presets["planned-14"]["nfe"] == 14 and presets["planned-14"]["psnr"] > 40
    assert presets["planned-8"]["seconds"] < presets["planned-14"]["seconds"] < presets["off"]["seconds"]
    methods = Methods(load_calibration("wan-tiny"))
    told = [(one["nfe"], one["psnr"]) for one in model["budgets"]]
    best = [methods.best(nfe).prediction for nfe, _ in told]
    assert [psnr for _, psnr in told] == [one and one.psnr for one in best] and len(told) > 5
    assert dict(told)[10] > 45 > dict(told)[8]  # of fitted solvers; the plans have 43 and 39
    assert model == api.client.get("/v1/models/wan-tiny").json()
    assert error_of(api.client.get("/v1/models/sora-2"))[:2] == (404, "model_not_found")
    for preset in presets:
        assert api.client.post("/v1/videos", json={"prompt": "x", "spectrum": preset}).status_code == 200


def test_it_is_ready_when_a_replica_could_begin(tmp_path: Path) -> None:
    with serving(tmp_path / "full", free=2**62) as api:
        assert api.client.get("/healthz").json() == {"status": "ok"}
        assert error_of(api.client.get("/readyz"))[:2] == (507, "disk_full")
    with serving(tmp_path / "well") as api:
        assert api.client.get("/readyz").json() == {"status": "ok"}


def test_metrics_count_by_route_and_never_by_id(api: Api) -> None:
    id = api.create()["id"]
    api.video(id)
    api.client.get("/nowhere/at/all")
    api.queue.show_replica(ReplicaEntry(0, "working", [], 0))
    text = api.client.get("/metrics").text
    assert 'lockstep_http_requests_total{method="POST",route="/v1/videos",status="200"} 1.0' in text
    assert 'route="/v1/videos/{video_id}",status="200"} 1.0' in text
    assert 'lockstep_http_requests_total{method="any",route="none",status="404"} 1.0' in text
    assert 'lockstep_queue_requests{state="waiting"} 1.0' in text
    assert 'lockstep_replicas{state="working"} 1.0' in text
    assert id not in text and "nowhere" not in text


def test_metrics_count_what_nobody_planned(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the server are answered outside of its middleware, and clients may invent methods."""
    monkeypatch.setattr(api.service.records, "page", broken)
    assert error_of(api.client.get("/v1/videos"))[0] == 500
    for method in ("INVENTED", "MADE-UP"):
        assert error_of(api.client.request(method, "/v1/videos"))[0] == 405
    text = api.client.get("/metrics").text
    assert 'lockstep_http_requests_total{method="GET",route="/v1/videos",status="500"} 1.0' in text
    assert 'lockstep_http_requests_total{method="any",route="/v1/videos",status="405"} 2.0' in text
    assert "INVENTED" not in text


def test_head_is_get_without_the_body(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a proxy or a downloader asks first: the same status and headers, also of streams, which end."""
    id = api.create()["id"]
    api.finish()
    running = api.create()["id"]
    ways = ("/healthz", "/studio/", "/docs", "/v1/videos", f"/v1/videos/{id}", f"/v1/videos/{id}/content")
    with listening(api) as url, httpx.Client(base_url=url, timeout=30) as client:
        for way in (*ways, f"/v1/videos/{id}/content?variant=thumbnail", "/v1/videos/none", "/nowhere"):
            got, head = client.get(way), client.head(way)
            assert (head.status_code, head.content) == (got.status_code, b""), way
            for name in ("content-type", "content-length", "etag", "x-should-retry"):
                assert head.headers.get(name) == got.headers.get(name), (way, name)
        part = client.head(f"/v1/videos/{id}/content", headers={"Range": "bytes=0-9"})
        assert (part.status_code, part.headers["content-length"]) == (206, "10")
        assert client.head(f"/v1/videos/{id}/events").status_code == 200
        for _ in range(40):  # more than may be open
            assert client.head(f"/v1/videos/{running}/events").status_code == 200
        assert client.head(f"/v1/videos/{id}/cancel").status_code == 405
    with serving(api.queue.folder.parent / "other") as other:
        monkeypatch.setattr(other.service.records, "page", broken)
        assert other.client.head("/v1/videos").status_code == 500


def broken(*arguments: object, **options: object) -> None:
    raise ZeroDivisionError
