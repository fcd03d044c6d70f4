"""A local Ray that cannot be started, and what watches one that runs; no cluster is started here."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from pathlib import Path

from launch.ray_cluster import Guard
from tests.jobs import PROMPT


def test_a_ray_that_cannot_be_started_is_said_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    small = ["--size", "64x48", "--frames", "5", "--steps", "4", "--ranks", "1", "--launcher", "ray"]
    ended = subprocess.run(
        [sys.executable, "-m", "launch", "generate", PROMPT, *small, "--out", str(tmp_path / "a.mp4")],
        env={**os.environ, "RAY_ADDRESS": "", "RAY_TMPDIR": str(file)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (3, ""), ended.stderr
    assert ended.stderr.count("Ray could not be started here: ") == 1, ended.stderr
    assert "Traceback" not in ended.stderr


class Blind(Guard):
    """Cannot look at processes."""

    def _look(self) -> None:
        raise RuntimeError("no processes today")


def test_the_end_of_the_guard_is_told() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    guard = Blind(told.put)
    assert "cannot be watched: RuntimeError('no processes today')" in told.get(timeout=60)
    guard.end()
