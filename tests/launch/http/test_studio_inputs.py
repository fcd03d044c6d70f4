"""What a person gives the studio beside text, in a real browser: an image, LoRAs, and a video to extend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from launch.http.auth import Keys
from launch.http.catalog import Catalog
from launch.http.service import Service
from launch.serve.queue import Queue
from runtime.media.latents import write_latents
from runtime.request.config import Config
from tests.browser import browsing, faults, needs_browser
from tests.conditioned import config_of, write_image, write_two_experts, write_vace
from tests.launch.commands.test_lora_option import write as write_lora
from tests.runtime.models.wan.test_lora_experts import write as write_for_experts
from tests.serving import Api, listening

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = [needs_browser, pytest.mark.alone]


@pytest.fixture(scope="module")
def served(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, str]]:
    """An API with a model for text, one for images too, and one of two experts; LoRAs for the first and the
    last; its address."""
    folder = tmp_path_factory.mktemp("inputs")
    vace = folder / "vace.yaml"
    vace.write_text(config_of(config, write_vace(folder / "vace")).model_dump_json(exclude_none=True))
    two = folder / "two.yaml"
    experts = write_two_experts("WanPipeline", folder / "two")
    two.write_text(config_of(config, experts).model_dump_json(exclude_none=True))
    loras = [(name, write_lora(folder / f"{name}.safetensors")) for name in ("soft", "bright")]
    loras.append(("sharp", write_for_experts(folder / "sharp.safetensors", 0)))
    with closing(Queue(folder / "queue")) as queue:
        api = Api(Service.on(queue, Catalog.of(["wan-tiny", str(vace), str(two)], loras=loras), Keys(None)))
        with listening(api) as url:
            yield api, url


@pytest.fixture
def api(served: tuple[Api, str]) -> Api:
    return served[0]


@pytest.fixture
def page(browser: Browser, served: tuple[Api, str]) -> Iterator[Page]:
    with browsing(browser, served[1], viewport={"width": 1280, "height": 900}) as (page, complaints):
        page.locator("#expected dl").wait_for()
        page.locator("details", has=page.locator("#image")).evaluate("details => (details.open = true)")
        yield page
        assert faults(complaints) == []


def test_loras_are_chosen_by_name_with_their_scales(page: Page, api: Api) -> None:
    page.locator("#prompt").fill("with a style")
    page.locator("input[name=budget][value=off]").check()
    page.get_by_label("bright", exact=True).check()
    page.get_by_label("Scale of bright").fill("0.5")
    page.get_by_role("button", name="Make video").click()
    page.locator("#open .card", has_text="with a style").wait_for()
    [entry] = [one for one in api.queue.entries() if one.job.request.prompt == "with a style"]
    [lora] = entry.job.config.lora
    assert (Path(lora.file).stem, lora.scale) == ("bright", 0.5)
    told = api.video(entry.name)["request"]
    assert told["loras"] == [{"name": "bright", "scale": 0.5}]


def test_a_lora_of_a_model_of_two_experts_is_for_one_of_them(page: Page, api: Api) -> None:
    page.locator("#model").select_option("two")
    page.locator("#prompt").fill("with the low one")
    page.locator("input[name=budget][value=off]").check()
    page.get_by_label("sharp", exact=True).check()
    page.get_by_label("Expert of sharp").select_option("low noise")
    page.get_by_label("Guidance, low noise").fill("3.5")
    page.get_by_role("button", name="Make video").click()
    page.locator("#open .card", has_text="with the low one").wait_for()
    [entry] = [one for one in api.queue.entries() if one.job.request.prompt == "with the low one"]
    told = api.video(entry.name)["request"]
    assert told["loras"] == [{"name": "sharp", "scale": 1.0, "expert": "low"}] and told["guidance_2"] == 3.5
    page.evaluate(f"location.hash = '#/videos/{entry.name}'")
    page.get_by_role("button", name="Edit and make again").click()
    assert page.get_by_label("sharp", exact=True).is_checked()
    assert page.get_by_label("Expert of sharp").input_value() == "low"
    page.locator("#model").select_option("wan-tiny")
    assert not page.get_by_label("Expert of sharp").is_visible()
    assert not page.get_by_label("Guidance, low noise").is_visible()


def test_an_image_is_uploaded_and_what_is_none_is_refused_beside_its_field(
    page: Page, api: Api, tmp_path: Path
) -> None:
    page.locator("#model").select_option("vace")
    page.locator("input[name=budget][value=off]").check()
    page.locator("#prompt").fill("from an image")
    text = tmp_path / "start.png"
    text.write_text("no image at all")
    page.locator("#image").set_input_files(text)
    page.get_by_role("button", name="Make video").click()
    page.locator("#input_reference-problem", has_text="not an image").wait_for()
    assert page.locator("#image").get_attribute("aria-invalid") == "true"
    image = write_image(tmp_path / "real.png")
    page.locator("#image").set_input_files(image)
    page.get_by_role("button", name="Make video").click()
    page.locator("#open .card", has_text="from an image").wait_for()
    [entry] = [one for one in api.queue.entries() if one.job.request.prompt == "from an image"]
    kept = entry.job.request.image
    assert kept is not None and Path(kept).parent == api.queue.folder / "assets"
    with Image.open(kept) as ours, Image.open(image) as theirs:
        assert ours.convert("RGB").tobytes() == theirs.convert("RGB").tobytes()
    assert api.video(entry.name)["request"]["image"] is True


def test_a_request_whose_answer_was_lost_is_carried_out_once(
    browser: Browser, served: tuple[Api, str]
) -> None:
    """A person whose connection broke clicks again."""
    api, url = served

    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    with browsing(browser, url) as (page, _):
        page.locator("#expected dl").wait_for()
        page.route("**/v1/videos", lose, times=1)
        page.locator("#prompt").fill("made once")
        make = page.get_by_role("button", name="Make video")
        with page.expect_event("requestfailed"):
            make.click()
        page.locator("button:not([aria-busy])", has_text="Make video").wait_for()
        make.click()
        page.locator("#said", has_text="The video is in the queue.").wait_for(state="attached")
        assert len([one for one in api.queue.entries() if one.job.request.prompt == "made once"]) == 1


def test_a_video_is_extended_if_its_model_can(page: Page, api: Api) -> None:
    plain = api.create(prompt="of text alone")["id"]
    first = api.create(prompt="the first part", model="vace")["id"]
    while api.finish() != first:
        continue
    write_latents(api.service.store.latents(first), torch.zeros(1, 16, 2, 6, 8), 5)
    page.evaluate(f"location.hash = '#/videos/{plain}'")
    page.get_by_role("button", name="Download").wait_for()
    assert page.get_by_role("button", name="Extend").count() == 0
    page.evaluate(f"location.hash = '#/videos/{first}'")
    page.get_by_role("button", name="Extend").click()
    page.get_by_label("What happens next").fill("the second part")
    page.get_by_label("Seconds to add").fill("1")
    page.locator("#extend").get_by_role("button", name="Extend").click()
    page.get_by_role("heading", level=1, name="the second part").wait_for()
    [entry] = [one for one in api.queue.entries() if one.job.request.prompt == "the second part"]
    assert api.video(entry.name)["request"]["extends"] == first
    assert entry.job.request.extend is not None and entry.job.request.frames == 5 + 8
