"""The page of a film, looked at in a browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.engine import Engine
from runtime.film.assemble import Part
from runtime.film.page import Scene, write_page
from runtime.jobs.run import run_job
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from tests.browser import look_at, needs_browser
from tests.jobs import job_of

Make = Callable[..., VideoRequest]
LATER = "a blue <b>square</b> & more"


@pytest.fixture(scope="module")
def page(engine: Engine, small: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shots: one that was compared, and one whose prompt changes."""
    folder = tmp_path_factory.mktemp("film")
    scenes = []
    for id, compare, fields in (
        ("one", True, {"spectrum": "paper"}),
        (
            "two",
            False,
            {"frames": 21, "travel": [{"at": 1, "prompt": LATER}], "spectrum": "off", "steps": 2},
        ),
    ):
        request = small(**fields)
        outputs = Outputs.named(folder / f"{id}.mp4")
        report = run_job(engine, job_of(engine, request, outputs, compare=compare))
        scenes.append(Scene(id, Part(f"Shot {id}", folder / f"{id}.mp4", request.frames), report))
    write_page(scenes, folder / "film.html", title="Two <shots>", fps=8)
    return folder / "film.html"


@needs_browser
def test_a_browser_shows_every_shot_and_complains_of_nothing(page: Path, tmp_path: Path) -> None:
    script = """{
        title: document.title,
        headings: [...document.querySelectorAll("h2")].map(h => h.innerText),
        images: [...document.images].map(i => [i.alt, i.naturalWidth, i.naturalHeight]),
        steps: [...document.querySelectorAll(".steps")].map(s => [...s.children].map(c => c.className)),
        widths: [...document.querySelectorAll(".steps i")].map(i => i.getBoundingClientRect().width > 0),
        prompts: [...document.querySelectorAll("dt + dd")].map(d => d.innerText),
    }"""
    seen, complaints = look_at(page, script, tmp_path)
    assert complaints == []
    assert seen["title"] == "Two <shots>"
    assert [heading.split(" · ")[0] for heading in seen["headings"]] == ["Shot one one", "Shot two two"]
    assert seen["images"] == [["one", 5 * 64, 48], ["two", 5 * 64, 48]]
    assert seen["steps"] == [["compute"] * 5 + ["forecast"], ["compute"] * 2]
    assert all(seen["widths"])
    assert any(LATER in text for text in seen["prompts"])


def test_the_page_needs_nothing_beside_it_and_says_what_was_measured(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "http" not in text and "file:" not in text
    assert text.count("against the full sampler") == 1
    assert "each on 2 windows" in text
    assert LATER not in text and "a blue &lt;b&gt;square" in text
