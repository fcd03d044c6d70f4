"""Ranks on Ray and the folder in which the user stands: its files are found, its modules are not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster.cluster import short_place
from launch.cluster.job_config import OwnModules
from tests.jobs import PROMPT
from tests.places import ROOT

FOREIGN = ("launch.py", "click.py", "random.py", "types.py", "runtime/__init__.py", "spectrum/__init__.py")

pytestmark = [pytest.mark.alone, pytest.mark.timeout(240)]


def test_modules_of_the_users_folder_are_not_imported(tmp_path: Path) -> None:
    for name in FOREIGN:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('{name} of the user')")
    (tmp_path / "mine.yaml").write_text((ROOT / "configs" / "wan-tiny.yaml").read_text())
    (tmp_path / "some.yaml").write_text("schedule: {kind: explicit, computed: [0, 1, 2]}\n")
    files = ["--config", "mine.yaml", "--spectrum", "some.yaml", "--out", "made/a.mp4"]
    long = tmp_path / ("a-folder-of-temporary-files-" * 4)  # sockets in it would have too long names
    long.mkdir()
    small = ["--size", "64x48", "--frames", "5", "--steps", "4", "--ranks", "2", "--launcher", "ray"]
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "launch", "generate", PROMPT, *small, *files],  # as the command does
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "", "TMPDIR": str(long)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "made/a.mp4\n"), ended.stderr
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"a.mp4", "a.json", "a.png"}


def test_sockets_lie_where_their_names_are_short_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert short_place() == {}
    monkeypatch.setenv("TMPDIR", "/scratch/job-17")
    assert short_place() == {}
    monkeypatch.setenv("TMPDIR", "/scratch/local/users/somebody/slurm-job-1234567")
    assert short_place() == {"_temp_dir": "/tmp/ray"}
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/ray")  # the user's own choice
    assert short_place() == {}


def test_ranks_look_where_the_driver_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout that is not installed is known by its folder alone."""
    checkout, link = tmp_path / "checkout", tmp_path / "link"
    checkout.mkdir()
    link.symlink_to(checkout)

    def told() -> list[str]:
        config = OwnModules()
        config._py_driver_sys_path.append(str(checkout))  # as Ray does
        config._serialize()
        return list(config._get_proto_job_config().py_driver_sys_path)

    assert told() == []
    monkeypatch.chdir(checkout)
    for place in ("", str(checkout), str(link)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [place, *sys.path])
            assert told() == [str(checkout)]
