"""OpenAI's own client against the API over a real socket: how it sends, pages, polls and sees errors."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from launch.serve.entries import State
from tests.places import ROOT
from tests.serving import Api, listening, serving

SMALL: dict[str, Any] = {"frames": 5, "steps": 4, "spectrum": "off"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("openai") / "queue") as opened:
        yield opened


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[openai.OpenAI]:
    with listening(api) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as opened:
        yield opened


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    """OpenAI shut its own video API down, and its client says so at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def test_a_plain_request_arrives_as_a_form(api: Api, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="a red circle", model="wan-tiny", seconds="4", size="64x48")
    assert (video.status, video.seconds, video.size, video.progress) == ("queued", "4.125", "64x48", 0)
    told = client.videos.create(
        prompt="x", size="64x48", extra_body={**SMALL, "seed": 7, "priority": 2, "loras": ["nothing"][:0]}
    )
    entry = next(one for one in api.queue.entries() if one.name == told.id)
    assert entry.priority == 2 and entry.job.request.seed == 7 and entry.job.request.frames == 5


def test_errors_have_a_class_and_a_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="x", size="64x50")
    assert (refused.value.code, refused.value.param) == ("invalid_value", "size")
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.create(prompt="x", model="sora-2")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.retrieve("video_0")
    assert refused.value.code == "video_not_found" and refused.value.type == "invalid_request_error"
    video = client.videos.create(prompt="x", extra_body=SMALL)
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.download_content(video.id)
    assert refused.value.code == "video_not_ready"


def test_an_image_may_be_sent_as_a_file_or_a_data_url(client: openai.OpenAI) -> None:
    written = BytesIO()
    Image.new("RGB", (16, 16)).save(written, "PNG")
    with pytest.raises(openai.BadRequestError, match="wan-tiny"):  # it was read: the model takes none
        client.videos.create(prompt="x", input_reference=written.getvalue())
    with pytest.raises(openai.BadRequestError, match="data URLs"):
        client.videos.create(
            prompt="x", extra_body={"input_reference": {"image_url": "data:text/plain;base64,aaaa"}}
        )


def test_pages_polls_and_downloads(api: Api, client: openai.OpenAI) -> None:
    for video in client.videos.list():
        client.videos.delete(video.id)
    ids = [client.videos.create(prompt="x", size="64x48", extra_body=SMALL).id for _ in range(5)]
    assert [one.id for one in client.videos.list(limit=2)] == ids[::-1]
    assert [one.id for one in client.videos.list(limit=3, order="asc")] == ids
    for _ in range(3):
        api.finish()
    api.finish(State.FAILED, "rank 0 died")
    assert client.videos.poll(ids[0]).status == "completed"
    failed = client.videos.poll(ids[3])
    assert failed.status == "failed" and failed.error is not None
    assert (failed.error.code, failed.error.message) == ("generation_failed", "rank 0 died")
    assert client.videos.download_content(ids[0]).content[4:8] == b"ftyp"
    for variant in ("thumbnail", "spritesheet"):
        with Image.open(BytesIO(client.videos.download_content(ids[0], variant=variant).content)) as picture:
            picture.load()
    assert client.videos.delete(ids[0]).deleted
    remix = client.videos.remix(ids[1], prompt="another")
    assert remix.remixed_from_video_id == ids[1] and remix.prompt == "another"


def test_a_cancelled_job_ends_polling_as_failed(api: Api, client: openai.OpenAI) -> None:
    video = client.videos.create(prompt="x", extra_body=SMALL)
    api.client.post(f"/v1/videos/{video.id}/cancel")
    ended = client.videos.poll(video.id)
    assert ended.status == "failed" and ended.error is not None and ended.error.code == "cancelled"


def test_what_no_model_here_can_do_is_refused_with_the_reason(client: openai.OpenAI) -> None:
    asks: list[Callable[[], Any]] = [
        lambda: client.videos.edit(prompt="x", video=b"video"),
        lambda: client.videos.extend(prompt="x", seconds="4", video=b"video"),
        lambda: client.videos.create_character(name="x", video=b"video"),
    ]
    for ask in asks:
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            ask()
        assert refused.value.code == "unsupported"
    with pytest.raises(openai.NotFoundError) as refused:
        client.videos.get_character("character_1")
    assert refused.value.code == "character_not_found"


def test_what_is_final_is_not_tried_again(api: Api, client: openai.OpenAI) -> None:
    eager = client.with_options(max_retries=5)
    asked = len(api.queue.entries())
    with pytest.raises(openai.UnprocessableEntityError):
        for prompt in ("one", "two"):
            eager.videos.create(prompt=prompt, extra_body=SMALL, extra_headers={"Idempotency-Key": "same"})
    assert len(api.queue.entries()) == asked + 1


def test_the_example_of_the_documentation_runs_as_it_is_printed(
    api: Api, client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert "http://127.0.0.1:8000/v1" in example
    over = threading.Event()

    def replica() -> None:
        while not over.wait(0.05):
            if api.queue.entries(State.WAITING):
                api.finish()

    working = threading.Thread(target=replica)
    working.start()
    monkeypatch.chdir(tmp_path)
    try:
        exec(example.replace("http://127.0.0.1:8000/v1", str(client.base_url)), {})
    finally:
        over.set()
        working.join()
    assert (tmp_path / "circle.mp4").read_bytes()[4:8] == b"ftyp"
