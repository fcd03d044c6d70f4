"""A file of prompts on several ranks, which load the model once, however they are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.commands.test_prompts import PROMPTS, TINY
from tests.places import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(400)]


def made(launcher: str, folder: Path, *words: str) -> tuple[int, list[str], str]:
    """Exit code of a command, the paths that it prints, and what it says."""
    command = [sys.executable, "-m", "launch", "generate", "--prompts", "prompts.txt", *TINY, *words]
    command += ["--size", "32x32", "--ranks", "2", "--launcher", launcher]
    ran = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout.splitlines(), ran.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_ranks_make_every_line_and_go_on_with_what_is_left(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    names = ["001-a-red-circle.mp4", "002-a-blue-square.mp4", "003-a-green-star.mp4"]
    code, printed, said = made(launcher, tmp_path)
    assert (code, printed) == (0, names), said
    assert said.count("loading wan-tiny") == 1  # for all three
    reports = [json.loads((tmp_path / name).with_suffix(".json").read_text()) for name in names]
    assert [one["request"]["prompt"] for one in reports] == ["a red circle", "a blue square", "a green star"]
    assert [one["topology"]["world"] for one in reports] == [2, 2, 2]

    (tmp_path / names[1]).unlink()
    (tmp_path / names[1]).with_suffix(".json").unlink()
    (tmp_path / names[1]).with_suffix(".png").unlink()
    first = (tmp_path / names[0]).stat().st_mtime_ns
    code, printed, said = made(launcher, tmp_path, "--resume")
    assert (code, sorted(printed)) == (0, names), said
    assert "2 of 3 requests are made already" in said
    assert (tmp_path / names[0]).stat().st_mtime_ns == first
    again = json.loads((tmp_path / names[1]).with_suffix(".json").read_text())
    assert again["frames_sha256"] == reports[1]["frames_sha256"]
