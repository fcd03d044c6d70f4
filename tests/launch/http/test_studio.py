"""The studio's files: served under a strict policy, in the package, and free of what the policy forbids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.http.page import FILES
from tests.serving import Api, error_of, serving

PAGE = (FILES / "index.html").read_text(encoding="utf-8")
MODULES = sorted(FILES.glob("*.js"))
STYLE = (FILES / "studio.css").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("queue")) as opened:
        yield opened


class _Elements(HTMLParser):
    """All elements of a page: name and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


ELEMENTS = _Elements(PAGE).found
IDS = [of["id"] for _, of in ELEMENTS if "id" in of]


def test_who_opens_the_server_sees_the_page(api: Api) -> None:
    answer = api.client.get("/")
    assert answer.status_code == 200 and answer.url.path == "/studio/" and answer.text == PAGE


@pytest.mark.parametrize(
    "name", ["", *(path.name for path in sorted(FILES.iterdir()) if path.suffix != ".py")]
)
def test_every_file_is_served_under_the_policy(api: Api, name: str) -> None:
    answer = api.client.get(f"/studio/{name}")
    assert answer.status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert all("unsafe" not in rule and "*" not in rule and "http" not in rule for rule in policy.values())
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    again = api.client.get(f"/studio/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize("name", ["none.js", "..%2Fpage.py", "%2e%2e", "page.py", "x" * 5000])
def test_nothing_else_is(api: Api, name: str) -> None:
    assert error_of(api.client.get(f"/studio/{name}"))[0] in (400, 404)


def test_the_page_is_of_its_own_files_alone() -> None:
    for tag, attributes in ELEMENTS:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        for name in ("src", "href"):
            link = attributes.get(name)
            assert link is None or link.startswith("#") or (FILES / link).is_file(), link
    assert [of for tag, of in ELEMENTS if tag == "script"] == [{"type": "module", "src": "studio.js"}]
    assert "<style" not in PAGE
    assert "//" not in STYLE and "url(" not in STYLE and "@import" not in STYLE


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.name))
def test_modules_make_no_markup_and_reach_no_other_server(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|https?://"
        r"|setAttribute\(\"style"
    )
    assert re.findall(forbidden, text) == []
    for name in re.findall(r'^import .* from "(.*)";$', text, re.MULTILINE):
        assert (FILES / name).is_file(), name
    assert all(len(line) <= 130 for line in text.splitlines())


def test_only_one_module_knows_the_key_and_no_url_has_it() -> None:
    knowing = [path.name for path in MODULES if "sessionStorage" in path.read_text(encoding="utf-8")]
    assert knowing == ["api.js"]
    assert "localStorage" not in (FILES / "api.js").read_text(encoding="utf-8")


def test_elements_that_modules_ask_for_are_there() -> None:
    assert len(IDS) == len(set(IDS))
    asked = {id for path in MODULES for id in re.findall(r'byId\("([\w-]+)"\)', path.read_text("utf-8"))}
    assert asked and asked <= set(IDS)


def test_every_field_has_a_label_and_every_description_is_there() -> None:
    labelled = {of["for"] for tag, of in ELEMENTS if tag == "label" and "for" in of}
    for tag, of in ELEMENTS:
        if tag in ("input", "select", "textarea") and of.get("type") not in ("radio", "checkbox"):
            assert of["id"] in labelled, of
        for name in ("aria-describedby", "aria-labelledby"):
            assert of.get(name) is None or of[name] in IDS, of
        if tag == "img":
            assert "alt" in of
    assert ("html", {"lang": "en"}) in ELEMENTS
    assert {"header", "nav", "main"} <= {tag for tag, _ in ELEMENTS}


def _colours(scheme: int) -> dict[str, str]:
    return {
        name: pair[scheme]
        for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)
    }


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrasts_reach_wcag_aa(scheme: int) -> None:
    colours = _colours(scheme)
    assert _contrast("#ffffff", "#000000") == pytest.approx(21)
    for ground in ("paper", "sheet", "well"):
        for text in ("ink", "quiet", "accent", "bad"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for edge in ("edge", "computed"):
            assert _contrast(colours[edge], colours[ground]) >= 3.0, (edge, ground)
    assert _contrast(colours["good"], colours["sheet"]) >= 4.5
    assert _contrast(colours["on-accent"], colours["accent"]) >= 4.5
