"""A new user's first hour: install, an own model, a notebook, twenty prompts, a film, and cleaning up.

It needs Python 3.11 or 3.12 with venv, git and make, and no GPU. All is in one folder, which is removed if
all went well:

    python3 scripts/first_hour.py                      # clones this checkout, and installs it there by `make`
    python3 scripts/first_hour.py --environment .venv  # with an environment that has Lockstep already
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--size", "64x48", "--frames", "5", "--steps", "8", "--spectrum", "off"]
FIRST_VIDEOS = 3  # of the twenty, before they are interrupted
NOTEBOOK = """
from runtime import CancelledError, load, plan

model = load("wan-tiny")
steps = []
video = model.generate("a blue square moving up on a white background", frames=5, on_step=steps.append)
assert video.frames.shape == (5, 96, 96, 3) and str(video.frames.dtype) == "uint8"
assert len(video.images()) == 5 and steps[-1].progress == 1.0
video.save("notebook.mp4")

try:
    model.generate(video.request, on_step=lambda step: step.stop())
except CancelledError as error:
    print("stopped:", error)
else:
    raise AssertionError("it was not stopped")

best = plan("wan-tiny", nfe=8)
planned = model.generate(video.request, frames=17, spectrum=best.save("planned.yaml"))
assert planned.computed == list(best.computed), (planned.computed, best.computed)
print(f"{planned.nfe} of {planned.steps} steps computed; expected {planned.psnr:.1f} dB")
"""
COLOURS, SHAPES = ("red", "blue", "green", "yellow"), ("circle", "square", "triangle", "star", "ring")
FILM = """\
title: Two shapes
width: 64
height: 48
defaults: {steps: 8, frames: 5, spectrum: off}
shots:
  - {id: circle, prompt: a red circle moving left on a black background}
  - {id: square, prompt: a blue square growing on a black background}
"""


class Hour:
    """The hour, in `folder`.

    Attributes:
        folder: all that it makes.
        desk: current folder of its commands.
        environment: the virtual environment.
    """

    def __init__(self, folder: Path, environment: Path):
        self.folder, self.desk, self.environment = folder, folder / "desk", environment
        self.variables = os.environ | {
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "TMPDIR": str(folder / "t"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "RAY_ADDRESS": "",
        }
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            self.variables.pop(name, None)
        for path in (self.desk, folder / "t"):
            path.mkdir(parents=True, exist_ok=True)

    def run(self, *words: str, where: Path | None = None) -> str:
        """Run a command to its end, and return what it prints on stdout."""
        done = subprocess.run(
            words,
            cwd=where or self.desk,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if words[0] == "make" else None,
            text=True,
            check=False,
        )
        check(done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}: {done.stdout[-2000:]}")
        return done.stdout

    def interrupted(self, until: Callable[[], bool], *words: str) -> None:
        """Run a command, and interrupt it as Ctrl-C does when `until` is true."""
        with subprocess.Popen(words, cwd=self.desk, env=self.variables, stdout=subprocess.DEVNULL) as process:
            while not until():
                check(process.poll() is None, f"{' '.join(words)} ended before it was interrupted")
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            code = process.wait(300)
        check(code == 130, f"{' '.join(words)} ended with {code} after Ctrl-C")

    def report(self, name: str) -> Mapping[str, object]:
        told: Mapping[str, object] = json.loads((self.desk / name).read_text(encoding="utf-8"))
        return told


def check(holds: bool, problem: str) -> None:
    """End the hour if something does not hold."""
    if not holds:
        raise SystemExit(f"first_hour: {problem}")


def install(hour: Hour) -> None:
    """Clone, and follow the first lines of the README."""
    clone = hour.environment.parent
    hour.run("git", "clone", "--quiet", str(ROOT), str(clone))
    hour.run("make", f"PYTHON={sys.executable}", "video", where=clone)
    made = {path.name for path in (clone / "out").iterdir()}
    check(made == {"video.mp4", "video.json", "video.png"}, f"make video made {sorted(made)}")
    hour.run("make", "clean", where=clone)
    check(not (clone / "out").exists(), "make clean left out/")


def look(hour: Hour) -> None:
    """See what there is."""
    check("wan-tiny" in hour.run("lockstep", "doctor"), "doctor does not know wan-tiny")
    check("generate" in hour.run("lockstep", "--help"), "--help does not list generate")


def own_model(hour: Hour) -> None:
    """A model of one's own: a folder, and a config made from it."""
    where = hour.run("python", "-c", "from runtime.request.config import EMBEDDED_MODELS as m; print(m)")
    shutil.copytree(Path(where.strip()) / "wan-tiny", hour.desk / "my-wan")
    made = hour.run("lockstep", "generate", "a red circle", "--model", "./my-wan", *SMALL, "--out", "own.mp4")
    check(made == "own.mp4\n", f"generate printed {made!r}")
    config = hour.run("lockstep", "config", "--model", "./my-wan").replace("steps: 50", "steps: 8")
    (hour.desk / "mine.yaml").write_text(config, encoding="utf-8")
    hour.run("lockstep", "generate", "a red circle", "--config", "mine.yaml", *SMALL, "--out", "same.mp4")
    digests = [hour.report(f"{name}.json")["frames_sha256"] for name in ("own", "same")]
    check(digests[0] == digests[1], "the config made from a model makes another video")


def notebook(hour: Hour) -> None:
    """A script as one has it in a notebook."""
    (hour.desk / "notebook.py").write_text(NOTEBOOK, encoding="utf-8")
    print(hour.run("python", "notebook.py"), end="")
    check((hour.desk / "notebook.mp4").is_file(), "the notebook saved no video")


def twenty_prompts(hour: Hour) -> None:
    """A file of prompts, interrupted on the way."""
    prompts = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    (hour.desk / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    out = hour.desk / "twenty"

    def videos() -> list[Path]:
        return sorted(out.glob("[!.]*.mp4"))  # without those that are not complete

    words = [
        "lockstep",
        "generate",
        "--prompts",
        "prompts.txt",
        *SMALL,
        "--out",
        "twenty/{number:03d}-{slug}.mp4",
    ]
    hour.interrupted(lambda: len(videos()) >= FIRST_VIDEOS, *words)
    before = {path: path.stat().st_mtime_ns for path in videos()}
    check(len(before) < len(prompts), "the interruption came too late")
    printed = hour.run(*words, "--resume").splitlines()
    check(len(videos()) == len(printed) == 20, f"{len(videos())} videos, {len(printed)} printed")
    check(videos()[0].name == "001-a-red-circle.mp4", f"the first is called {videos()[0].name}")
    again = [path.name for path, at in before.items() if path.stat().st_mtime_ns != at]
    check(not again, f"made again: {again}")


def resumed(hour: Hour) -> None:
    """One video that is interrupted ends as one that is not."""
    words = ["lockstep", "generate", "a green star", "--steps", "40", "--spectrum", "off", "--frames", "9"]
    words += ["--checkpoint-every", "1"]
    kept = hour.desk / "star.checkpoints"
    hour.interrupted(lambda: any(kept.glob("*/manifest-*.json")), *words, "--out", "star.mp4")
    hour.run(*words, "--out", "star.mp4", "--resume")
    hour.run(*words, "--out", "other.mp4")
    one, other = hour.report("star.json"), hour.report("other.json")
    check(one["resumed_at"] != 0, "the second attempt began at the first step")
    check(one["frames_sha256"] == other["frames_sha256"], "the resumed video has other frames")
    check(not kept.exists(), "checkpoints are left")


def film(hour: Hour) -> None:
    """A film, an edit, and what the edit leaves."""
    board, shots = hour.desk / "film.yaml", hour.desk / "film" / "shots"
    board.write_text(FILM, encoding="utf-8")
    hour.run("lockstep", "storyboard", "film.yaml", "--out", "film", "--dry-run")
    check(hour.run("lockstep", "storyboard", "film.yaml", "--out", "film") == "film/film.mp4\n", "no film")
    before = {path: path.stat().st_mtime_ns for path in shots.glob("*.mp4")}
    board.write_text(FILM.replace("a blue square", "a green square"), encoding="utf-8")
    hour.run("lockstep", "storyboard", "film.yaml", "--out", "film")
    same = {path for path, at in before.items() if path.stat().st_mtime_ns == at}
    check(same == {*before}, "shots that were not edited were made again")
    check(len([*shots.glob("*.mp4")]) == 3, "the edited shot was not made")
    hour.run("lockstep", "storyboard", "film.yaml", "--out", "film", "--prune")
    check(len([*shots.glob("*.mp4")]) == 2, "the replaced shot was not pruned")


def queue(hour: Hour) -> None:
    """Two requests, served and shown."""
    for name in ("one", "two"):
        hour.run("lockstep", "queue", "add", f"a red {name}", *SMALL, "--out", f"{name}.mp4")
    hour.run("lockstep", "queue", "run")
    told = json.loads(hour.run("lockstep", "status", "--all", "--json"))
    check(told["count"]["done"] == 2, f"the queue has {told['count']}")


def clean_up(hour: Hour) -> None:
    """Nothing is left beside what was named, and everything can be removed."""
    made = {path.name for path in (hour.folder / "t").iterdir()}
    left = {name for name in made if not name.startswith(("ray", "torchinductor_"))}  # see docs/files.md
    check(not left, f"left in the temporary folder: {sorted(left)}")
    left = {path.name for path in (hour.folder / "cache").glob("*")} - {"lockstep", "matplotlib", "pip"}
    check(not left, f"left in the cache: {sorted(left)}")
    hidden = [path.name for path in hour.desk.rglob(".*")]
    check(not hidden, f"left beside the results: {hidden}")
    half = [path.name for path in hour.desk.rglob("*.checkpoints")]
    check(not half, f"left of jobs that are done: {half}")
    shutil.rmtree(hour.desk / "queue")


def uninstall(hour: Hour) -> None:
    """Remove the package from the environment that was made for it."""
    hour.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "lockstep-video")
    check(not (hour.environment / "bin" / "lockstep").exists(), "the command is still there")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the hour."""

    name: str
    do: Callable[[Hour], None]


PARTS = [
    Part("look around", look),
    Part("own model", own_model),
    Part("notebook", notebook),
    Part("twenty prompts, interrupted", twenty_prompts),
    Part("one video, interrupted", resumed),
    Part("film, edited", film),
    Part("queue", queue),
    Part("clean up", clean_up),
]


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Say how long a part took."""
    print(f"== {name}", flush=True)
    began = time.monotonic()
    yield
    print(f"== {name}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, help="virtual environment that has Lockstep already")
    parser.add_argument("--folder", type=Path, help="where to do it; by default a temporary folder")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="hour-"))
    own = given.environment is None
    parts = [Part("install", install), *PARTS, Part("uninstall", uninstall)] if own else PARTS
    hour = Hour(folder, folder / "lockstep" / ".venv" if own else given.environment.absolute())
    began = time.monotonic()
    for part in parts:
        with timed(part.name):
            part.do(hour)
    shutil.rmtree(folder)
    print(f"done in {(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
