"""Jobs of `scripts/chaos.py`: commands that are disturbed, how each is resumed, and its expected results."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imageio_ffmpeg

TIMEOUT, BUSY = 10.0, 20.0  # seconds, what `--timeout` and `--busy-timeout` are given
_BOUNDS = ("--timeout", f"{TIMEOUT:g}", "--busy-timeout", f"{BUSY:g}")
_TINY = ("--size", "64x48", "--frames", "5", "--max-sequence-length", "32")
_PROMPTS = ("a red circle moving left on a black background", "a blue square growing on a black background")
_GROUP = ("driver", "terminal", "rank", "rank", "rank", "ffmpeg")
_CLUSTER = (*_GROUP, "helper", "helper", "raylet", "gcs", "agent", "worker")
_SAME = ("frames_sha256", "decision_digest", "computed", "nfe", "steps", "request")  # of a report
_MAY_DIFFER = ("seconds", "made", "versions")  # of a calibration
_FILM = """\
title: Two shots
width: 64
height: 48
defaults: {steps: 16, frames: 5, spectrum: paper}
shots:
""" + "".join(f"  - {{id: s{number}, prompt: {prompt}}}\n" for number, prompt in enumerate(_PROMPTS))

Bits = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One kind of job, in a folder of its own that is the working directory of its command.

    Attributes:
        arguments: arguments of `lockstep`.
        again: arguments that are added to resume after an interruption.
        victims: roles of processes that may be hit; a role that is listed twice is hit twice as often.
        folders: folders that are made beforehand; each gets foreign files, and a disk that may become full.
        stdout: the only permitted output on stdout, once it is done.
        begins, ends: patterns of the marks (see `chaos_watch`) at which denoising begins and ends.
        bits: results that must be equal, however the job was disturbed.
        files: files that are written beforehand.
        queued: names of requests that are put into the queue beforehand, and again if they have failed.
    """

    name: str
    arguments: tuple[str, ...]
    victims: tuple[str, ...]
    folders: tuple[str, ...]
    stdout: str
    begins: str
    ends: str
    bits: Callable[[Path], Bits]
    again: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    queued: tuple[str, ...] = ()

    @property
    def on_ray(self) -> bool:
        return "gcs" in self.victims

    def prepare(self, folder: Path) -> None:
        """Make the files that the command finds in its folder."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        if self.queued:
            _in_queue(folder, [_request(name) for name in self.queued])

    def repair(self, folder: Path) -> None:
        """Add failed requests again: a queue keeps them, but does not repeat them."""
        if self.queued:
            _in_queue(folder, [[*_request(name), "--resume"] for name in self.queued], only_failed=True)


def _generate(name: str, *more: str, victims: tuple[str, ...], folders: tuple[str, ...]) -> Job:
    out = ("--out", "out/video.mp4", "--checkpoint-every", "1", "--steps", "24", *_BOUNDS)
    return Job(
        name=name,
        arguments=("generate", _PROMPTS[0], *_TINY, *out, *more),
        again=("--resume",),
        victims=victims,
        folders=folders,
        stdout=r"(.*/)?out/video\.mp4\n",
        begins=r"step \d+/24|part-",
        ends=r"step 24/24|out/video\.mp4",
        bits=lambda folder: _video_bits(folder / "out/video.mp4"),
    )


def _calibrate(name: str, *more: str, victims: tuple[str, ...]) -> Job:
    given = ("--prompts", "prompts.txt", *_TINY, "--steps", "8", "--out", "out/tiny.json", *more)
    return Job(
        name=name,
        arguments=("calibrate", *given),
        victims=victims,
        folders=("out", "t"),
        stdout=r"(.*/)?out/tiny\.json\n",
        begins=r"video 1 of",
        ends=r"out/tiny\.json",
        bits=lambda folder: _calibration(folder / "out/tiny.json"),
        files={"prompts.txt": "\n".join(_PROMPTS) + "\n"},
    )


def _jobs() -> list[Job]:
    kept = ("--checkpoints", "kept")
    pair = ("--ranks", "2", "--launcher")
    return [
        _generate("inline", *kept, victims=("driver", "terminal", "ffmpeg"), folders=("out", "kept", "t")),
        _generate("compared", "--compare", victims=("driver", "terminal", "ffmpeg"), folders=("out", "t")),
        _generate("torchrun", *pair, "torchrun", victims=_GROUP, folders=("out", "t")),
        _generate("ray", *pair, "ray", *kept, victims=_CLUSTER, folders=("out", "kept", "t")),
        *(
            Job(
                name=f"queue-{replicas}",
                arguments=("queue", "run", "--queue", "queue", "--replicas", str(replicas)),
                victims=_CLUSTER,
                folders=("out", "queue", "t"),
                stdout="",
                begins=r"begins|part-",
                ends=r"out/second\.mp4",
                bits=lambda folder: {n: _video_bits(folder / f"out/{n}.mp4") for n in ("first", "second")},
                queued=("first", "second"),
            )
            for replicas in (1, 2)
        ),
        *(
            Job(
                name=f"film-{replicas}",
                arguments=("storyboard", "film.yaml", "--out", "film", "--replicas", str(replicas)),
                victims=_CLUSTER,
                folders=("film", "t"),
                stdout=r"(.*/)?film/film\.mp4\n",
                begins=r"begins|part-",
                ends=r"film/film\.mp4",
                bits=lambda folder: {"film": _frames(folder / "film/film.mp4")},
                files={"film.yaml": _FILM},
            )
            for replicas in (1, 2)
        ),
        _calibrate("calibrate", victims=("driver", "terminal")),
        _calibrate("calibrate-2", "--ranks", "2", "--timeout", f"{TIMEOUT:g}", victims=_GROUP[:-1]),
    ]


JOBS = {job.name: job for job in _jobs()}


def _video_bits(video: Path) -> Bits:
    """Digests of a video's frames, from its report and from the file, and the decisions that made them."""
    report = json.loads(video.with_suffix(".json").read_text("utf-8"))
    return {"mp4": _frames(video), **{name: report[name] for name in _SAME}}


def _calibration(path: Path) -> Bits:
    found = json.loads(path.read_text("utf-8"))
    return {name: value for name, value in found.items() if name not in _MAY_DIFFER}


def _frames(video: Path) -> str:
    """Compute SHA-256 of a video's decoded frames."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(video), "-f", "rawvideo", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout
    return hashlib.sha256(decoded).hexdigest()


def _request(name: str) -> list[str]:
    steps = ("--steps", "16", "--checkpoint-every", "1", *_BOUNDS)
    return ["queue", "add", _PROMPTS[0], *_TINY, *steps, "--out", f"out/{name}.mp4", "--queue", "queue"]


_ASK = r"""
import contextlib, io, json, sys
from launch.cli import run
requests, only_failed = json.loads(sys.argv[1])
if only_failed:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        run(["status", "--queue", "queue", "--json", "--all"])
    entries = json.loads(told.getvalue())["requests"]
    state = {entry["text"]["outputs"]["video"]: entry["state"] for entry in entries}
    given_up = [out for out, how in state.items() if how in ("failed", "cancelled")]
    requests = [r for r in requests if any(out.endswith(r[r.index("--out") + 1]) for out in given_up)]
sys.exit(max((run(request) for request in requests), default=0))
"""


def _in_queue(folder: Path, requests: list[list[str]], *, only_failed: bool = False) -> None:
    """Put requests into the queue, in one process."""
    told = json.dumps([requests, only_failed])
    done = subprocess.run(
        [sys.executable, "-c", _ASK, told], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"queue add ended with {done.returncode}: {done.stderr}")


def normal(name: str) -> str:
    """Remove from a name what differs from run to run: process ids, random letters, digests of paths."""
    name = re.sub(r"\.[\w-]+\.\d+\.\w{8}\.part", ".part", name)
    return re.sub(r"-[0-9a-f]{8}\.checkpoints", ".checkpoints", name)
