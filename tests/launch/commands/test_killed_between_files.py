"""A job that was killed between its report and its video: the same command with --resume ends as if it had
not been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli
from tests.jobs import PROMPT, TINY, make_job
from tests.kills import done, killed_between_files
from tests.ranks import run_ranks

OPTIONS = [
    "--size=64x48", "--frames=5", "--max-sequence-length=32", "--steps=4", "--spectrum=paper", "--timeout=5",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_go_on_over_the_files_of_the_attempt_before(tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    killed_between_files(make_job(out, **TINY), world=2)
    resumed = run_ranks(2, done, make_job(out, **TINY, resume=True))[0]
    undisturbed = run_ranks(2, done, make_job(tmp_path / "b.mp4", **TINY))[0]
    assert resumed == (TINY["steps"], *undisturbed[1:])
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in "ab" for kind in ("mp4", "json", "png")
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_signal_that_nobody_handles_leaves_nothing_that_the_next_command_does_not_remove(
    tmp_path: Path,
) -> None:
    """SIGQUIT while the video is being made: by the same command with --resume."""
    out = tmp_path / "a.mp4"
    command = ["prlimit", "--core=0", sys.executable, "-m", "launch", "generate", PROMPT, *OPTIONS[:3]]
    command += ["--steps=40", "--spectrum=off", "--checkpoint-every=1", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("*/*/manifest-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGQUIT)
    assert process.returncode == -signal.SIGQUIT
    assert len(list(tmp_path.glob(".a.*.part.*"))) > 1
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert json.loads((tmp_path / "a.json").read_text())["resumed_at"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.png"}


@pytest.mark.timeout(240)
def test_one_command_goes_on_alone_and_what_is_done_is_not_made_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.mp4"
    killed_between_files(make_job(out, **TINY))
    command = [PROMPT, *OPTIONS, "--out", str(out)]
    queued = ["queue", "add", *command, "--queue", str(tmp_path / "queue")]
    for whole in (["generate", *command], queued):
        assert cli.run(whole) == 2  # neither the files nor the checkpoints are given up unasked
    assert cli.run([*queued, "--resume"]) == 0
    assert cli.run(["generate", *command, "--resume"]) == 0
    assert cli.run(["generate", PROMPT, *OPTIONS, "--out", str(tmp_path / "b.mp4")]) == 0
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (one["resumed_at"], other["resumed_at"]) == (TINY["steps"], 0)
    for field in ("frames_sha256", "decision_digest"):
        assert one[field] == other[field]
    before = out.stat().st_mtime_ns
    assert cli.run(["generate", *command, "--resume"]) == 2
    assert "exists; give another name, or --overwrite" in capfd.readouterr().err
    assert out.stat().st_mtime_ns == before
