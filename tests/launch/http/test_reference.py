"""The page of the API's description has all of it, and nothing that is not ours."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

from launch.http.docstrings import described, summary
from launch.http.reference import page_of
from launch.http.video import VideoCreate
from tests.browser import browsing, faults, needs_browser
from tests.serving import Api, listening, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("reference") / "queue") as opened:
        yield opened


class _Page(HTMLParser):
    """Ids and links of a page, and its text."""

    def __init__(self, content: str):
        super().__init__()
        self.ids, self.links, self.tags, self.text = list[str](), list[str](), set[str](), ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.tags.add(tag)
        self.ids += [of["id"] or ""] if "id" in of else []
        self.links += [of["href"] or ""] if "href" in of else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_operation_and_every_object_is_on_the_page(api: Api) -> None:
    told = api.client.get("/openapi.json").json()
    answer = api.client.get("/docs")
    page = _Page(answer.text)
    operations = [f"{method.upper()}-{path}" for path, of in told["paths"].items() for method in of]
    assert sorted(page.ids) == sorted([*operations, *told["components"]["schemas"]]) and len(operations) > 25
    assert {link[1:] for link in page.links if link.startswith("#")} == {*page.ids}
    assert {link for link in page.links if not link.startswith("#")} == {
        "openapi.json",
        "studio/",
        "studio/icon.svg",
        "studio/reference.css",
    }
    assert not page.tags & {"script", "style", "iframe", "img"}
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for name in VideoCreate.model_fields:
        assert f"<code>{name}</code>" in answer.text


def test_it_is_made_once_and_sent_to_who_has_not_got_it(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    first = api.client.get("/docs")

    def broken(told: object) -> str:
        raise AssertionError

    monkeypatch.setattr("launch.http.reference.page_of", broken)
    again = api.client.get("/docs", headers={"If-None-Match": "another"})
    assert (again.status_code, again.text) == (200, first.text)
    kept = api.client.get("/docs", headers={"If-None-Match": first.headers["etag"]})
    assert (kept.status_code, kept.content) == (304, b"")


def test_fields_are_described_as_the_models_docstrings_do(api: Api) -> None:
    schemas = api.client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["VideoCreate"]["properties"]
    for name in ("guidance_2", "extends", "seconds", "frames"):  # inherited, its own, and two together
        assert fields[name]["description"] == described(VideoCreate)[name]
    assert fields["guidance_2"]["description"].startswith("scale of the second expert")
    assert all("Attributes:" not in one.get("description", "") for one in schemas.values())
    assert summary("One.\n\nAttributes:\n    a: b\n        c.\n\nTwo.") == "One.\n\nTwo."


def test_what_a_description_says_is_text() -> None:
    told: dict[str, Any] = {
        "info": {"title": "<b>x</b>", "version": "1", "description": "`<i>` & more"},
        "paths": {},
        "components": {
            "schemas": {"A": {"description": "<script>", "properties": {"a<": {"type": "string"}}}}
        },
    }
    page = page_of(told)
    assert "<script>" not in page and "<b>x</b>" not in page and "<code>a&lt;</code>" in page
    assert "<code>&lt;i&gt;</code> &amp; more" in page


@needs_browser
@pytest.mark.alone
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_it_fits_its_window(api: Api, browser: Browser, width: int, scheme: str) -> None:
    settings = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with listening(api) as url, browsing(browser, f"{url}/docs", **settings) as (page, said):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("link", name="VideoCreate", exact=True).first.click()
        assert page.evaluate("location.hash") == "#VideoCreate"
        assert faults(said) == []
