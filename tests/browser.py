"""Looking at pages with a headless Chromium, where one is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
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
