"""A model of two experts over HTTP: guidance and LoRAs for each, and estimates that know of the switch."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.http.auth import Keys
from launch.http.catalog import Catalog
from launch.http.profiles import settings_of
from launch.http.service import Service
from launch.serve.queue import Queue
from runtime.engine import Engine
from runtime.jobs.run import run_job
from runtime.media.latents import write_latents
from runtime.profile import ModelProfile
from runtime.request.config import Config, Lora, load_config
from spectrum import paper_schedule
from spectrum.universal import universal
from tests.conditioned import config_of, sampled, write_image, write_two_experts
from tests.runtime.models.wan.test_lora_experts import write as write_lora
from tests.serving import SMALL, Api, error_of

BOUNDARY, STEPS = 0.9, 20
TWO = {**SMALL, "model": "two", "steps": STEPS, "guidance": 4.0, "guidance_2": 2.5}
SWITCH = "stream: velocity\nschedule: {kind: paper, warmup: 4}\nswitch: {history: fresh, warmup: 3}\n"
LONG = "wan2.2-t2v-14b-480p"  # shipped, and its weights are not here


@pytest.fixture(scope="module")
def own(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("models") / "two"
    return sampled(
        config_of(config, write_two_experts("WanImageToVideoPipeline", folder, BOUNDARY)), "unipc", 5
    )


@pytest.fixture
def api(own: Config, tmp_path: Path) -> Iterator[Api]:
    config, preset = tmp_path / "two.yaml", tmp_path / "fresh.yaml"
    config.write_text(own.model_dump_json(exclude_none=True))
    preset.write_text(SWITCH)
    loras = [(name, write_lora(tmp_path / name, seed)) for seed, name in enumerate(("fast", "soft"))]
    offered = Catalog.of(["wan-tiny", str(config), LONG], [str(preset)], loras)
    with closing(Queue(tmp_path / "queue")) as queue:
        yield Api(Service.on(queue, offered, Keys(None)))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    content = write_image(tmp_path_factory.mktemp("image") / "start.png").read_bytes()
    return {"image_url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def high_noise(own: Config) -> int:
    """Number of steps of the first expert."""
    request = own.request("x", width=64, height=48, frames=5, steps=STEPS)
    timesteps = ModelProfile(own).fresh_sampler(request).timesteps
    first = int((timesteps >= 1000 * BOUNDARY).sum())
    assert 0 < first < STEPS
    return first


def papers(first: int, steps: int, warmups: Sequence[int]) -> list[int]:
    """The paper's steps, begun again with the second expert."""
    high, low = paper_schedule(first, warmup=warmups[0]), paper_schedule(steps - first, warmup=warmups[1])
    return [*high.computed, *(first + step for step in low.computed)]


@pytest.mark.parametrize(("preset", "warmups"), [("paper", (5, 2)), ("fresh", (4, 3))])
def test_an_estimate_counts_the_steps_that_the_second_expert_begins_with(
    api: Api, own: Config, image: dict[str, str], preset: str, warmups: tuple[int, int]
) -> None:
    asked = {**TWO, "spectrum": preset, "input_reference": image}
    told = api.client.post("/v1/videos/estimate", json=asked).json()
    assert told["computed"] == papers(high_noise(own), STEPS, warmups) and told["nfe"] == len(
        told["computed"]
    )


def test_so_it_does_for_a_model_that_is_not_here_yet(api: Api) -> None:
    asked = {"prompt": "x", "model": LONG, "spectrum": "paper"}
    told = api.client.post("/v1/videos/estimate", json=asked).json()
    assert told["computed"] == papers(26, 40, (5, 2))
    usual = api.client.post("/v1/videos/estimate", json={"prompt": "x", "model": LONG}).json()
    settings = settings_of(load_config(LONG))
    assert settings is not None
    levels = settings.fresh_sampler(load_config(LONG).request("x")).sigmas.tolist()
    assert usual["spectrum"] == "universal" and usual["psnr"] is None
    assert tuple(usual["computed"]) == universal().planner(levels).plan(paper_schedule(40).nfe).computed
    model = api.client.get(f"/v1/models/{LONG}").json()
    assert {one["id"]: one["nfe"] for one in model["presets"]}["paper"] == told["nfe"]
    assert model["experts"] == 2 and model["extensible"] is None
    assert api.client.get("/v1/models/wan-tiny").json()["experts"] == 1


def test_the_second_guidance_is_kept_by_all_that_is_made_from_a_video(
    api: Api, image: dict[str, str]
) -> None:
    first = api.create(**TWO, input_reference=image)["id"]
    api.finish()
    write_latents(api.service.store.latents(first), torch.zeros(1, 16, 2, 6, 8), 5)
    remixed = api.client.post(f"/v1/videos/{first}/remix", json={"prompt": "another"})
    extended = api.client.post(f"/v1/videos/{first}/extensions", json={"prompt": "then", "seconds": 1})
    other = api.create(**TWO | {"guidance_2": 6, "frames": 4}, extends=first)
    for told in (api.video(first), remixed.json(), extended.json()):
        assert (told["request"]["guidance"], told["request"]["guidance_2"]) == (4.0, 2.5)
    assert (other["request"]["extends"], other["request"]["guidance_2"]) == (first, 6.0)
    jobs = [entry.job.request for entry in api.queue.entries()]
    assert sorted(request.second_scale for request in jobs) == [2.5, 2.5, 2.5, 6.0]


def test_shots_of_a_film_have_the_films_or_their_own(api: Api, image: dict[str, str]) -> None:
    usual = {name: TWO[name] for name in ("model", "size", "frames", "steps", "guidance", "guidance_2")}
    shots = [
        {"prompt": "a", "input_reference": image},
        {"prompt": "b", "input_reference": image, "guidance_2": 7},
    ]
    film = api.client.post("/v1/films", json={"title": "x", **usual, "shots": shots}).json()
    found = [api.video(shot["video_id"])["request"]["guidance_2"] for shot in film["shots"]]
    assert found == [2.5, 7.0]


def test_a_lora_may_be_for_one_expert(api: Api, image: dict[str, str], tmp_path: Path) -> None:
    loras: list[Any] = [
        {"name": "fast", "expert": "high"},
        {"name": "soft", "scale": 0.5, "expert": "low"},
        "soft",
    ]
    told = api.create(**TWO, input_reference=image, loras=loras)
    expected = [
        {"name": "fast", "scale": 1.0, "expert": "high"},
        {"name": "soft", "scale": 0.5, "expert": "low"},
    ]
    assert told["request"]["loras"] == [*expected, {"name": "soft", "scale": 1.0}]
    fast, soft = (str(tmp_path / name) for name in ("fast", "soft"))
    [entry] = api.queue.entries()
    high, low = Lora(file=fast, expert="high"), Lora(file=soft, scale=0.5, expert="low")
    assert entry.job.config.lora == (high, low, Lora(file=soft))
    remix = api.client.post(f"/v1/videos/{told['id']}/remix", json={"prompt": "another"}).json()
    assert remix["request"]["loras"] == told["request"]["loras"]


def test_the_video_is_made_as_it_was_estimated(api: Api, image: dict[str, str]) -> None:
    loras = [{"name": "fast", "expert": "high"}, {"name": "soft", "expert": "low"}]
    asked = {**TWO, "spectrum": "fresh", "input_reference": image, "loras": loras}
    told = api.client.post("/v1/videos/estimate", json=asked).json()
    api.create(**asked)
    entry = api.queue.take(0)
    assert entry is not None
    entry.job.outputs.video.parent.mkdir(parents=True, exist_ok=True)
    run_job(Engine(entry.job.config), entry.job)
    report = json.loads(entry.job.outputs.report.read_text())
    assert report["computed"]["cond"] == told["computed"] and report["request"]["guidance_2"] == 2.5


def test_a_form_says_it_too(api: Api, image: dict[str, str]) -> None:
    parts = {"loras[][name]": ["fast", "soft"], "loras[][expert]": ["high", "low"]}
    lines = [*TWO.items(), ("input_reference[image_url]", image["image_url"])]
    lines += [(name, values[number]) for number in range(2) for name, values in parts.items()]
    files = [(name, (None, str(value))) for name, value in lines]
    answer = api.client.post("/v1/videos", files=files)
    assert answer.status_code == 200, answer.text
    [entry] = api.queue.entries()
    assert [(Path(one.file).name, one.expert) for one in entry.job.config.lora] == [
        ("fast", "high"),
        ("soft", "low"),
    ]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"guidance_2": 3}, "guidance_2", "has only one transformer"),
        ({"model": "two", "guidance_2": 101}, "guidance_2", "100"),
        ({"loras": [{"name": "fast", "expert": "high"}]}, "loras", "the model has one transformer"),
        ({"model": "two", "loras": [{"name": "fast", "expert": "x"}]}, "loras.0.expert", "'high' or 'low'"),
        ({"model": "two", "loras": [{"name": "none", "expert": "low"}]}, "loras", "offers fast, soft"),
    ],
)
def test_what_a_model_cannot_use_is_refused(
    api: Api, image: dict[str, str], fields: dict[str, Any], param: str, said: str
) -> None:
    asked = {**SMALL, **fields} | ({"input_reference": image} if "model" in fields else {})
    for path in ("videos", "videos/estimate"):
        answer = api.client.post(f"/v1/{path}", json=asked)
        assert error_of(answer) == (400, "invalid_value", param)
        message = answer.json()["error"]["message"]
        assert said in message and "/" not in message


def test_the_description_shows_both(api: Api) -> None:
    told = api.client.get("/openapi.json").json()["components"]["schemas"]["VideoCreate"]
    shown = [example for example in told["examples"] if "guidance_2" in example]
    assert shown and {one.get("expert") for one in shown[0]["loras"]} == {"high", "low"}
    for example in told["examples"]:
        assert api.client.post("/v1/videos/estimate", json={**example, "loras": []}).status_code == 200
