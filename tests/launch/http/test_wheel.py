"""The wheel has all that the server needs beside code: the studio's files, configs and the embedded model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from launch.http.page import FILES
from tests.places import ROOT

STUDIO = {path.name for path in FILES.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    [found] = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Where the wheel is unpacked: its packages, with the dependencies of this environment."""
    folder = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, timeout=120, capture_output=True)
    return folder


@pytest.fixture
def url(installed: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a server that runs from the installed wheel, far from the checkout."""
    command = [sys.executable, "-m", "launch", "serve", "--port", "0", "--replicas", "0", "--queue", "queue"]
    env = os.environ | {"PYTHONPATH": str(installed)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()
    assert process.returncode == 0


def test_a_wheel_contains_the_studio(wheel: Path) -> None:
    assert {"index.html", "studio.css", "studio.js", "icon.svg"} <= STUDIO
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        for name in STUDIO:
            assert packed.read(f"launch/http/studio/{name}") == (FILES / name).read_bytes()
    assert {"runtime/_configs/wan-tiny.yaml", "runtime/models/wan-tiny/model_index.json"} <= {*names}
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_a_server_from_an_installed_wheel_has_the_page(url: str, installed: Path) -> None:
    page = httpx.get(f"{url}/", follow_redirects=True)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    linked = {*re.findall(r'(?:src|href)="([\w.-]+)"', page.text)}
    assert {"studio.js", "studio.css"} <= linked <= STUDIO
    for name in STUDIO:
        answer = httpx.get(f"{url}/studio/{name}")
        assert answer.status_code == 200, name
        assert answer.content == (installed / "launch" / "http" / "studio" / name).read_bytes()
    described = httpx.get(f"{url}/docs")
    assert described.status_code == 200 and "VideoCreate" in described.text
    asked = {"prompt": "a red circle", "spectrum": "planned-14"}
    estimate = httpx.post(f"{url}/v1/videos/estimate", json=asked, timeout=60).json()
    assert estimate["model"] == "wan-tiny" and estimate["nfe"] == 14
