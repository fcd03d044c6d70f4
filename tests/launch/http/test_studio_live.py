"""The studio through real videos: steps and previews appear while they are made, by a pool on a real Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.browser import browsing, faults, needs_browser
from tests.forked import Command
from tests.places import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [needs_browser, pytest.mark.alone, pytest.mark.timeout(590)]

_PATIENCE = 150.0
PAST = "[...document.querySelectorAll('#open .card:first-child .bars .past')].map(bar => bar.classList[0])"
PREVIEW = "document.querySelector('#open .card:first-child img').naturalWidth"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a pool of its own; its address."""
    folder = tmp_path_factory.mktemp("studio")
    words = ["serve", "--port", "0", "--queue", str(folder / "queue")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    with (folder / "stderr").open("wb") as log:
        process = Command(words, spares=1, env=env, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            while httpx.get(f"{url}/readyz").status_code != 200:  # its Ray starts
                assert process.poll() is None
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            with process:
                process.wait(timeout=120)


@pytest.fixture
def page(browser: Browser, server: str, tmp_path: Path) -> Iterator[Page]:
    """The studio, of which the browser must not have complained; what it was at the end is in `tmp_path`."""
    with browsing(browser, server, viewport={"width": 1280, "height": 900}) as (page, complaints):
        page.locator("#expected dl").wait_for()
        yield page
        page.screenshot(path=tmp_path / "end.png", full_page=True)
        assert faults(complaints) == []


def wait(page: Page, script: str) -> Any:
    """Wait until an expression is true in the page. (Playwright's own waiting needs a policy with `eval`.)"""
    deadline = time.monotonic() + _PATIENCE
    while not (found := page.evaluate(script)):
        assert time.monotonic() < deadline, script
        page.wait_for_timeout(100)
    return found


def make(page: Page, prompt: str, budget: str, **fields: str) -> None:
    page.locator("#prompt").fill(prompt)
    page.locator(f"input[name=budget][value={budget}]").check()
    page.evaluate("document.querySelector('.more').open = true")
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_role("button", name="Make video").click()


def test_steps_appear_as_they_are_made_and_a_long_video_goes_on_where_it_was_cancelled(page: Page) -> None:
    make(page, "a long one", "off", width="160", height="160", seconds="1", steps="40")
    wait(page, f"{PAST}.length > 2")
    wait(page, f"{PREVIEW} > 0")
    assert set(page.evaluate(PAST)) == {"compute"}
    page.locator("#open .card").get_by_role("button", name="Cancel").press("Enter")
    ended = page.locator("#ended .card", has_text="a long one")
    ended.get_by_text("Cancelled").wait_for()
    done = page.evaluate("document.querySelectorAll('#ended .past').length")
    assert 2 < done < 40
    ended.get_by_role("button", name="Resume").press("Enter")
    assert wait(page, f"{PAST}.length > 0 && {PAST}.length") >= done - 10  # from its last checkpoint
    page.locator("#ended .card[data-state=done]").wait_for(timeout=1000 * _PATIENCE)
    assert page.evaluate("document.querySelectorAll('#ended .past.compute').length") == 40


@pytest.mark.slow
def test_a_budget_is_kept_and_compared_with_the_full_sampler(page: Page) -> None:
    make(page, "a red circle moving left on a black background", "nfe", nfe="12", seed="7", seconds="1")
    card = page.locator("#ended .card", has_text="a red circle")
    card.get_by_text("Done").wait_for(timeout=1000 * _PATIENCE)
    wait(page, "document.querySelectorAll('#ended .card:first-child .past.compute').length === 12")
    page.locator("#expected", has_text="as measured here").wait_for()
    card.locator("a.prompt").click()
    wait(page, "document.querySelector('.stage video').readyState >= 2")
    assert wait(page, "document.querySelector('.sheets .picture').width") > 500  # as wide as the page
    page.get_by_role("button", name="Compare").click()
    page.locator(".measured", has_text="PSNR").wait_for(timeout=1000 * _PATIENCE)
    said = re.search(r"PSNR ([\d.]+) dB", page.locator(".measured").inner_text())
    assert said is not None and 15 < float(said[1]) < 100  # near, and not the same
