"""ffmpeg as a child: files whatever they are called, an end in every case, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from runtime.errors import JobFailedError
from runtime.files.scratch import scratch_file
from runtime.media.ffmpeg import Ffmpeg, file_url, run_ffmpeg
from runtime.media.frames import read_frames
from runtime.media.mp4 import mp4_writer
from runtime.media.quality import RawVideo, compare_videos

FRAME = np.random.default_rng(0).integers(0, 255, (1, 480, 640, 3), np.uint8)
ENDLESS = ["-f", "lavfi", "-i", "testsrc2=size=640x480:rate=30", "-f", "null", "-"]
ODD = [
    "take:2",
    "-x",
    "concat:a|b",
    "a%20b%03d",
    "new\nline",
    "it's; [0:v]=,",
    "caf\udce9",
    "猫 🎬",
    "pipe:0",
]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_a_file_whatever_it_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with mp4_writer(Path(f"{name}.mp4"), width=64, height=48, fps=8) as sink:
        sink.write(np.zeros((3, 48, 64, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.mp4"]
    assert len(read_frames(Path(f"{name}.mp4"))) == 3
    Path(name).write_bytes(np.zeros((3, 96, 96, 3), np.uint8).tobytes())
    raw = RawVideo(Path(name), 96, 96)
    assert compare_videos(raw, raw).ssim == 1.0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_ends_with_the_block_that_uses_it(error: type[BaseException], tmp_path: Path) -> None:
    before = children()
    with pytest.raises(error), mp4_writer(tmp_path / "a.mp4", width=640, height=480, fps=8) as sink:
        sink.write(FRAME)
        assert len(children() - before) == 1
        raise error
    assert children() <= before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_one_is_an_error_that_says_so(number: signal.Signals, tmp_path: Path) -> None:
    before = children()
    with (
        pytest.raises(
            JobFailedError, match=r"ffmpeg could not write the video \((killed by SIG(KILL|TERM)|exit 255)"
        ),
        mp4_writer(tmp_path / "a.mp4", width=640, height=480, fps=8) as sink,
    ):
        sink.write(FRAME)
        (child,) = children() - before
        os.kill(child, number)
        for _ in range(200):
            sink.write(FRAME)
    assert children() <= before
    assert list(tmp_path.iterdir()) == []


def take_nothing(ffmpeg: Ffmpeg) -> None:
    for _ in range(200):
        ffmpeg.write(FRAME.reshape(-1).data)


@pytest.mark.parametrize("wait", [take_nothing, Ffmpeg.read, Ffmpeg.finish])
def test_one_that_stands_still_is_given_up(wait: Callable[[Ffmpeg], object]) -> None:
    before = children()
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "640x480", "-i", "pipe:0", "-f", "null", "-"]
    with (
        pytest.raises(JobFailedError, match="it did nothing for 1 s"),
        Ffmpeg(*raw, doing="do it", silence=1.0) as ffmpeg,
    ):
        (child,) = children() - before
        os.kill(child, signal.SIGSTOP)
        wait(ffmpeg)
    assert children() <= before


def test_it_dies_with_the_process_that_started_it() -> None:
    code = (
        "import sys; from runtime.media.ffmpeg import Ffmpeg\n"
        f"ffmpeg = Ffmpeg('-progress', 'pipe:1', *{ENDLESS!r}, doing='go on')\n"
        "ffmpeg.read(); print(ffmpeg._process.pid, flush=True); ffmpeg.finish()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert "ffmpeg" in child.name()
        parent.kill()
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_what_it_said_is_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match=r"could not look \(exit \d+\): .*No such file"):
        run_ffmpeg("-i", file_url(tmp_path / "none"), doing="look")


def test_a_full_disk_fails_the_video_and_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, whose files cannot grow beyond 100 kB."""
    code = (
        "import resource, signal, sys, numpy as np\nfrom pathlib import Path\n"
        "from runtime.media.mp4 import mp4_writer\nfrom runtime.errors import JobFailedError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "noise = np.random.default_rng(0).integers(0, 255, (40, 480, 640, 3), np.uint8)\n"
        "try:\n"
        "    with mp4_writer(Path(sys.argv[1]) / 'a.mp4', width=640, height=480, fps=8) as sink:\n"
        "        sink.write(noise)\n"
        "except JobFailedError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "ffmpeg could not write the video" in done.stdout and "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_scratch_files_have_no_name_and_children_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_file() as file:
        file.write(b"one")
        file.write(b" two")
        assert list(tmp_path.iterdir()) == []
        path = file.path
        assert path.read_bytes() == b"one two"
        assert subprocess.run(["cat", path], capture_output=True, check=True).stdout == b"one two"
    assert not path.exists()


def test_without_room_tmpdir_is_named(tmp_path: Path) -> None:
    code = (
        "import resource, signal\nfrom runtime.files.scratch import scratch_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with scratch_file() as file:\n    file.write(bytes(2000))\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    told = f"temporary files: cannot write in '{tmp_path}': File too large (set TMPDIR to use another folder)"
    assert told in done.stderr
