"""The studio in a real browser: what a person sees and does. A pool's work is done to the queue by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from launch.http import joining
from launch.http.joining import Joiner
from launch.http.keys import Key, add_key, digest_of
from launch.http.rounds import Rounds
from tests.browser import browsing, faults, needs_browser
from tests.serving import Api, listening, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [needs_browser, pytest.mark.alone]

PROMPT = "a red circle <b>moving</b> & <img src=x onerror=alert(1)>"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
ORDER = (
    "[...document.querySelectorAll('#shots .shot')]"
    ".map(shot => shot.querySelector('textarea')?.value ?? 'video')"
)
RING = """(() => {
    const at = document.activeElement;
    const ring = getComputedStyle(at.type === "radio" ? at.nextElementSibling : at);
    return [at.id || at.textContent.trim() || at.value, ring.outlineStyle];
})()"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, str]]:
    """An API with two finished videos, and its address."""
    with serving(tmp_path_factory.mktemp("queue")) as api, listening(api) as url:
        joiner = Rounds("joiner", joining.EVERY, Joiner(api.service).join, "films are joined later")
        joiner.start()
        for prompt in ("a green square", PROMPT):
            api.create(prompt=prompt, spectrum="paper", steps=12)
            api.finish()
        yield api, url
        joiner.stop()


@pytest.fixture
def api(served: tuple[Api, str]) -> Api:
    return served[0]


@pytest.fixture
def page(browser: Browser, served: tuple[Api, str]) -> Iterator[Page]:
    """The studio, of which the browser must not have complained at the end of a test."""
    with browsing(browser, served[1], viewport=WIDE, color_scheme="light") as (page, complaints):
        page.locator("#expected dl").wait_for()
        page.locator("#ended .card[data-state=done] img[src]").nth(1).wait_for()
        yield page
        assert faults(complaints) == []


def test_what_was_typed_is_text(page: Page) -> None:
    assert page.locator("#ended a.prompt").first.inner_text() == PROMPT
    page.locator("#ended a.prompt").first.click()
    page.get_by_role("heading", level=1, name=PROMPT).wait_for()
    assert page.locator("img[src=x]").count() == 0 and page.locator("main b").count() == 0


def test_what_is_expected_follows_the_form(page: Page) -> None:
    page.locator("#expected", has_text="14 of 50").wait_for()
    assert "best-14" in page.locator("#expected").inner_text()
    page.locator("details.more summary").click()
    page.locator("#steps").fill("20")  # for which nothing is calibrated
    page.locator("#expected", has_text="of 20").wait_for()
    assert "universal" in page.locator("#expected").inner_text()
    page.locator("#steps").fill("")
    page.locator("input[name=budget][value=nfe]").check()
    page.locator("#nfe").fill("12")
    page.locator("#expected", has_text="12 of 50").wait_for()
    assert re.search(r"[0-9.]+ dB", page.locator("#expected").inner_text())
    page.locator("input[name=budget][value=off]").check()
    page.locator("#expected", has_text="50 of 50").wait_for()
    assert "Exact" in page.locator("#expected").inner_text()


def test_what_the_server_refuses_is_said_beside_the_field(page: Page) -> None:
    page.get_by_role("button", name="Make video").click()
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.locator("#prompt-problem").inner_text() != ""
    page.locator("#prompt").fill("a")
    page.locator("#width").fill("65")
    page.locator("#size-problem", has_text="multiple of 16").wait_for()
    assert page.locator("#width").get_attribute("aria-invalid") == "true"
    page.locator("#width").fill("64")
    page.locator("#size-problem").wait_for(state="hidden")
    assert page.locator("#width").get_attribute("aria-invalid") is None


def test_a_video_is_made_cancelled_resumed_and_deleted(page: Page, api: Api) -> None:
    page.locator("#prompt").fill("another one")
    page.get_by_role("button", name="Make video").click()
    waiting, ended = (page.locator(f"#{place} .card", has_text="another one") for place in ("open", "ended"))
    waiting.get_by_role("button", name="Cancel").press("Enter")
    ended.get_by_text("Cancelled").wait_for()
    ended.get_by_role("button", name="Resume").press("Enter")
    waiting.wait_for()
    api.finish()
    ended.get_by_text("Done").wait_for()
    ended.locator("a.prompt").press("Enter")
    page.get_by_role("button", name="Delete").click()
    page.locator("#confirm").get_by_role("button", name="Delete").click()
    ended.wait_for(state="detached")
    assert page.evaluate("location.hash") == "#/"


def test_it_is_set_beside_the_full_sampler_and_downloaded(page: Page, api: Api) -> None:
    page.locator("#ended a.prompt", has_text="a green square").first.click()
    page.get_by_role("button", name="Compare").click()
    page.locator(".beside .card").wait_for()
    api.finish()
    page.locator(".measured", has_text="PSNR 100.0 dB").wait_for()
    page.get_by_label("Position in both videos").fill("0.5")
    times = page.evaluate("[...document.querySelectorAll('.pair video')].map(media => media.currentTime)")
    assert times[0] == times[1] > 0.2
    with page.expect_download() as saved:
        page.get_by_role("button", name="Download").click()
    assert saved.value.path().read_bytes()[4:8] == b"ftyp"


def test_the_gallery_is_searched_and_shows_contact_sheets(page: Page) -> None:
    page.get_by_role("link", name="Gallery").click()
    page.get_by_label("Search prompts").fill("nothing like it")
    page.locator("#no-tiles").wait_for()
    page.get_by_label("Search prompts").fill("CIRCLE")
    assert page.locator(".tile").count() == 1
    page.get_by_label("Contact sheets").check()
    page.locator(".tile img.spritesheet[src]").wait_for()
    assert "spritesheet" in (page.locator(".tile img").get_attribute("src") or "")


def test_a_film_is_made_from_shots_that_were_dragged(page: Page, api: Api) -> None:
    page.get_by_role("link", name="Storyboard").click()
    page.locator("#tray button").first.drag_to(page.locator("#no-shots"))
    assert page.evaluate(ORDER) == ["video"]
    page.get_by_role("button", name="Add shot").press("Enter")
    page.keyboard.type("a green triangle")
    page.locator("#shots .handle").nth(1).press("ArrowUp")
    assert page.evaluate(ORDER) == ["a green triangle", "video"]
    assert page.evaluate("document.activeElement.className") == "handle"
    _drag(page, 0, 1)
    assert page.evaluate(ORDER) == ["video", "a green triangle"]
    page.locator("#shots .shot").nth(1).get_by_label("Crossfade").fill("2")
    page.reload()  # a storyboard outlives the page
    page.locator("#shots .shot").nth(1).wait_for()
    page.get_by_label("Title of the film").fill("Two <shots>")
    page.get_by_role("button", name="Make film").click()
    page.get_by_role("heading", level=1, name="Two <shots>").wait_for()
    api.finish()
    page.locator("#view-film .stage video").wait_for()
    assert page.locator(".reel li").count() == 2
    assert "crossfade over 2 frames" in page.locator(".reel").inner_text()


def _drag(page: Page, one: int, other: int) -> None:
    """Drag a shot by its handle below the middle of another."""
    handle, target = page.locator("#shots .handle").nth(one), page.locator("#shots .shot").nth(other)
    start, end = handle.bounding_box(), target.bounding_box()
    assert start is not None and end is not None
    page.mouse.move(start["x"] + 10, start["y"] + 10)
    page.mouse.down()
    page.mouse.move(end["x"] + 10, end["y"] + 0.8 * end["height"], steps=5)
    page.mouse.up()


def test_it_is_used_by_keyboard_alone(page: Page) -> None:
    page.reload()
    page.locator("#expected dl").wait_for()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(RING))
    names = [name for name, _ in seen]
    assert names[0] == "Skip to the content"
    assert names.index("prompt") < names.index("model") < names.index("width") < names.index("height")
    assert all(ring != "none" for _, ring in seen), seen


def test_it_fits_a_phone_in_the_dark(browser: Browser, served: tuple[Api, str]) -> None:
    api, url = served
    [film] = [one["id"] for one in api.client.get("/v1/films").json()["data"]] or [""]
    settings = {"viewport": PHONE, "color_scheme": "dark", "reduced_motion": "reduce", "has_touch": True}
    with browsing(browser, url, **settings) as (page, complaints):
        page.locator("#ended .card").first.wait_for()
        video = page.evaluate("document.querySelector('#ended .prompt').hash")
        for view in ("#/", "#/gallery", "#/storyboard", video, f"#/film/{film}"):
            page.evaluate("hash => { location.hash = hash }", view)
            page.locator("main > section:not([hidden]) h1").wait_for(state="attached")
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], view
        red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
        assert int(red) < 40
        assert page.evaluate("document.getAnimations().length") == 0
        assert faults(complaints) == []


def test_a_key_is_asked_for_and_is_in_no_url(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    add_key(keys, Key(name="ann", owner="ann", sha256=digest_of("lockstep-secret")))
    with (
        serving(tmp_path / "queue", keys) as api,
        listening(api) as url,
        browsing(browser, url) as (page, complaints),
    ):
        page.locator("#key-dialog").wait_for()
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.locator("#key-problem", has_text="not known").wait_for()
        urls: list[str] = []
        page.on("request", lambda asked: urls.append(asked.url))
        page.get_by_label("Key", exact=True).fill("lockstep-secret")
        page.keyboard.press("Enter")
        page.locator("#expected dl").wait_for()
        page.locator("#prompt").fill("a red circle")
        page.get_by_role("button", name="Make video").click()
        page.locator("#open .card").wait_for()
        api.finish()
        page.locator("#ended .card[data-state=done] img[src^=blob]").wait_for()
        assert (
            page.evaluate("Object.values(sessionStorage).concat(Object.values(localStorage))").count(
                "lockstep-secret"
            )
            == 1
        )
        assert urls and not any("secret" in asked for asked in urls)
        assert not any("secret" in said for said in complaints)
