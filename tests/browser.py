"""Looking at pages with a headless Chromium, where one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
_WITHOUT = (  # features of Chromium; as the last such option counts, Playwright's list stands here, too
    "AvoidUnnecessaryBeforeUnloadCheckSync", "DestroyProfileOnBrowserClose", "HttpsUpgrades",
    "HttpsFirstBalancedModeAutoEnable", "LensOverlay", "MediaRouter", "PaintHolding",
    "ThirdPartyStoragePartitioning", "AvoidCorsURLLoaderRestartOnRedirect", "OptimizationHints",
    "NetworkTimeServiceQuerying", "AimEnabled", "PreconnectToSearch",
    # The list under the address bar is a page of its own for each window, which nobody sees here.
    "WebUIOmniboxPopup", "WebUIOmniboxAimPopup", "WebUIOmniboxFullPopup",
)  # fmt: skip
_ERRORS = re.compile(r"CONSOLE.*|ERR_\w+.*|Uncaught.*")


def look_at(page: Path, script: str, folder: Path) -> tuple[Any, list[str]]:
    """Open a page; the value of a JavaScript expression in it, and what the browser complained of.

    Args:
        script: its value must be JSON.
        folder: for a copy of the page that tells the value, and the browser's profile.
    """
    assert CHROMIUM is not None
    probe = (
        "<script>onload = () => { const told = JSON.stringify(" + script + ");"
        "const pre = document.createElement('pre'); pre.id = 'told'; pre.textContent = told;"
        "document.body.append(pre); }</script>"
    )
    copy = folder / "probed.html"
    copy.write_text(page.read_text("utf-8").replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1])), _ERRORS.findall(done.stderr)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium; it keeps nothing from one `browsing` for the next."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options.append(f"--disable-features={','.join(_WITHOUT)}")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextmanager
def browsing(browser: Browser, url: str, **settings: Any) -> Iterator[tuple[Page, list[str]]]:
    """A page at `url` in a profile of its own, and what the browser complains of from now on.

    Args:
        settings: of Playwright's browser context, such as `color_scheme`.
    """
    complaints: list[str] = []
    with browser.new_context(**settings) as context:
        context.set_default_timeout(120_000)  # a busy machine is no failure
        page = context.new_page()
        page.on("console", lambda said: complaints.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if not _own(asked.url, url) else None)
        page.goto(url)
        yield page, complaints


def _own(asked: str, url: str) -> bool:
    """Whether a request is for the page's own server, or for bytes that the page has already."""
    server = "{0.scheme}://{0.netloc}/".format(urlsplit(url))
    return asked.startswith((server, f"blob:{server}"))


def faults(complaints: list[str]) -> list[str]:
    """Complaints, but for the lines that Chromium writes for each answer that is a refusal."""
    return [said for said in complaints if not re.search("Failed to load resource.* 40[04]", said)]
