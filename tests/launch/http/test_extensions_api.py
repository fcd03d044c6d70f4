"""Extensions over HTTP: what goes on from a finished video, and what is refused, with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from launch.http.auth import Keys
from launch.http.catalog import Catalog
from launch.http.service import Service
from launch.serve.entries import State
from launch.serve.queue import Queue
from runtime.engine import Engine
from runtime.jobs.run import run_job
from runtime.media.frames import read_frames
from runtime.request.config import Config
from tests.conditioned import config_of, write_vace
from tests.serving import SMALL, Api, error_of, listening

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
VACE = {**SMALL, "model": "vace", "frames": 9, "steps": 3}


@pytest.fixture(scope="module")
def own(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A VACE model with windows of 9 frames."""
    return config_of(config, write_vace(tmp_path_factory.mktemp("models") / "vace"))


@pytest.fixture(scope="module")
def vace(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture
def api(own: Config, tmp_path: Path) -> Iterator[Api]:
    config = tmp_path / "vace.yaml"
    config.write_text(own.model_dump_json(exclude_none=True))
    with closing(Queue(tmp_path / "queue")) as queue:
        yield Api(Service.on(queue, Catalog.of(["wan-tiny", str(config)]), Keys(None)))


def make(api: Api, engine: Engine) -> str:
    """Make the next video as a replica does; its id."""
    entry = api.queue.take(0)
    assert entry is not None
    entry.job.outputs.video.parent.mkdir(parents=True, exist_ok=True)
    run_job(engine, entry.job)
    api.queue.end(entry.id, State.DONE)
    return entry.name


def extend(api: Api, id: str, **fields: Any) -> Any:
    return api.client.post(f"/v1/videos/{id}/extensions", json={"prompt": "a blue square", **fields})


def test_an_extension_begins_with_the_video_and_outlives_it(api: Api, vace: Engine) -> None:
    api.create(**VACE)
    first = make(api, vace)
    told = extend(api, first, seconds=1).json()
    assert (told["status"], told["seconds"], told["size"]) == ("queued", "2.125", "64x48")  # of both
    assert told["request"]["frames"] == 17 and told["request"]["extends"] == first
    assert told["request"]["seed"] == api.video(first)["request"]["seed"]
    mp4 = api.client.get(f"/v1/videos/{first}/content").content
    assert api.client.delete(f"/v1/videos/{first}").status_code == 200
    assert not (api.queue.folder / "results" / first).exists()
    second = make(api, vace)
    assert api.video(second)["status"] == "completed"
    video = api.service.store.video(second)
    assert len([*read_frames(video)]) == 17
    report = api.client.get(f"/v1/videos/{second}/report").json()
    assert report["request"]["extend"] == {"file": "before.safetensors", "frames": 9}
    assert mp4[4:8] == b"ftyp"
    longer = extend(api, second, frames=4).json()
    assert longer["request"]["frames"] == 21 and make(api, vace) == longer["id"]
    assert api.client.delete(f"/v1/videos/{longer['id']}").status_code == 200
    assert not (api.queue.folder / "results" / longer["id"]).exists()


def test_openais_client_extends_the_file_that_it_downloaded(api: Api, vace: Engine) -> None:
    api.create(**VACE)
    first = make(api, vace)
    with listening(api) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        file = client.videos.download_content(first).content
        video = client.videos.extend(prompt="a blue square", seconds="4", video=file)
        assert (video.status, video.seconds) == ("queued", "5.125")
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.videos.extend(prompt="a blue square", seconds="4", video=b"another")
        assert (refused.value.code, refused.value.param) == ("unsupported", "video")
    for given in ({"id": first}, first):
        told = api.client.post("/v1/videos/extensions", json={"prompt": "x", "video": given}).json()
        assert told["request"]["extends"] == first and told["request"]["frames"] == 9 + 16  # as long as usual
    form = api.client.post(
        "/v1/videos/extensions", data={"prompt": "x", "seconds": "1", "video[id]": first}, files={"none": b""}
    )
    assert error_of(form)[:2] == (400, "unknown_parameter")


def test_a_video_of_a_model_for_text_alone_is_refused_for_good(api: Api) -> None:
    api.create()
    tiny = api.finish()
    answer = extend(api, tiny)
    assert error_of(answer) == (422, "unsupported", "extends")
    assert "makes videos from text alone" in answer.json()["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert not api.service.store.latents(tiny).exists()


def test_what_is_not_there_or_does_not_fit_is_refused(api: Api, vace: Engine) -> None:
    waiting = api.create(**VACE)["id"]
    assert error_of(extend(api, waiting)) == (400, "video_not_ready", "extends")
    api.finish(State.FAILED, "rank 0 died")
    assert error_of(extend(api, waiting)) == (400, "video_failed", "extends")
    assert error_of(extend(api, "video_0"))[:2] == (404, "video_not_found")
    api.create(**VACE)
    first = make(api, vace)
    for fields, param in (
        ({"frames": 6}, "frames"),
        ({"frames": 4, "seconds": 1}, None),
        ({"frames": 4000}, "frames"),
        ({"seconds": 900}, "seconds"),
        ({"prompt": " "}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"size": "96x96"}, "size"),
        ({"video": first}, "video"),
    ):
        status, code, blamed = error_of(extend(api, first, **fields))
        assert (status, blamed) == (400, param), (fields, code)
    for fields, param in (
        ({"size": "96x96"}, "size"),
        ({"model": "wan-tiny"}, "model"),
        ({"fps": 9}, "fps"),
        ({"input_reference": {"image_url": PIXEL}}, "input_reference"),
    ):
        answer = api.client.post("/v1/videos", json={"prompt": "x", "extends": first, **fields})
        assert error_of(answer) == (400, "invalid_value", param)
    assert [entry.state for entry in api.queue.entries()].count(State.WAITING) == 0
    api.service.store.latents(first).unlink()
    assert error_of(extend(api, first)) == (404, "content_missing", "extends")
    kept = {path.name for path in (api.queue.folder / "results").iterdir()}
    assert kept == {first}


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAA"
    "AElFTkSuQmCC"
)


def test_extensions_are_estimated_repeated_and_remixed(api: Api, vace: Engine) -> None:
    api.create(**VACE)
    first = make(api, vace)
    asked = {"prompt": "x", "extends": first, "frames": 8, "steps": 3, "spectrum": "off"}
    told = api.client.post("/v1/videos/estimate", json=asked).json()
    assert (told["frames"], told["model"], told["size"]) == (17, "vace", "64x48")
    url, headers = f"/v1/videos/{first}/extensions", {"Idempotency-Key": "once"}
    once, again = (api.client.post(url, json={"prompt": "x", "frames": 8}, headers=headers) for _ in range(2))
    assert once.json()["id"] == again.json()["id"] and again.headers["Idempotent-Replayed"] == "true"
    kept = {path.name for path in (api.queue.folder / "results").iterdir()}
    assert kept == {first, once.json()["id"]}
    keyed = {"headers": {"Idempotency-Key": "created"}, "json": asked}
    created = api.client.post("/v1/videos", **keyed).json()["id"]
    remix = api.client.post(f"/v1/videos/{once.json()['id']}/remix", json={"prompt": "another"}).json()
    assert remix["request"]["extends"] == first and remix["request"]["frames"] == 17
    api.client.delete(f"/v1/videos/{first}")
    again = api.client.post("/v1/videos", **keyed).json()
    assert again["id"] == created  # it was accepted when the first one was there
