"""Every shipped config through every launcher, a queue and a storyboard: interrupted, resumed, same bits.

Those of few steps end before they can be interrupted; `tests/runtime/test_shipped_configs.py` runs them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runtime.request.config import load_config
from tests.conditioned import write_image
from tests.repositories import IN_MANY_STEPS, write_config, write_repositories

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(900)]

STEPS = 60
SMALL = ["--size", "64x64", "--frames", "5", "--steps", str(STEPS), "--spectrum", "off"]
LAUNCHERS = {"inline": 1, "torchrun": 2, "ray": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every config, an image, and a cache of the repositories that the configs name."""
    folder = tmp_path_factory.mktemp("shipped")
    write_repositories(folder / "cache")
    write_image(folder / "image.png")
    for name in IN_MANY_STEPS:
        write_config(name, folder)
    return folder


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`lockstep`, which finds the repositories in the cache and nothing else."""
    cache = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments],
        env=clean | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder: Path, *arguments: str) -> None:
    process = command(folder, *arguments)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said


def interrupted(folder: Path, mark: str, *arguments: str) -> None:
    """Send an interrupt when `mark` is said; the command ends as one that was cancelled."""
    process = command(folder, *arguments)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if mark in line:
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=400)
    assert process.returncode == 130, said + rest


def asked(name: str, folder: Path) -> list[str]:
    """Arguments of a request for this config."""
    image = ["--image", str(folder / "image.png")] if "i2v" in name or "vace" in name else []
    return ["a red circle", "--config", str(folder / f"{name}.yaml"), *SMALL, *image]


def report(path: Path) -> dict[str, object]:
    return dict(json.loads(path.with_suffix(".json").read_text()))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, object]:
    """Digests of every config's frames, made by one rank without a break."""
    found = {}
    for name in IN_MANY_STEPS:
        out = folder / f"{name}-whole.mp4"
        finished(folder, "generate", *asked(name, folder), "--out", str(out))
        found[name] = report(out)["frames_sha256"]
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", IN_MANY_STEPS)
def test_each_is_resumed_by_every_launcher(
    folder: Path, undisturbed: dict[str, object], name: str, launcher: str
) -> None:
    out, ranks = folder / f"{name}-{launcher}.mp4", LAUNCHERS[launcher]
    options = [*asked(name, folder), "--out", str(out), "--checkpoint-every", "1", "--timeout", "10"]
    options += ["--launcher", launcher, "--ranks", str(ranks)]
    interrupted(folder, "step 6/", "generate", *options)
    finished(folder, "generate", *options, "--resume")
    told = report(out)
    assert 0 < int(str(told["resumed_at"])) < STEPS
    if ranks == 1:  # on more the attention is summed in another order
        assert told["frames_sha256"] == undisturbed[name]


def test_all_go_through_a_queue(folder: Path, undisturbed: dict[str, object]) -> None:
    queue = ["--queue", str(folder / "queue")]
    for name in IN_MANY_STEPS:
        out = str(folder / f"{name}-queue.mp4")
        finished(folder, "queue", "add", *asked(name, folder), "--out", out, *queue)
    interrupted(folder, "begins", "queue", "run", *queue)
    finished(folder, "queue", "run", *queue)
    for name in IN_MANY_STEPS:
        assert report(folder / f"{name}-queue.mp4")["frames_sha256"] == undisturbed[name]


def test_all_go_into_one_film(folder: Path, undisturbed: dict[str, object]) -> None:
    shots = []
    for name in IN_MANY_STEPS:
        image = {"image": str(folder / "image.png")} if "i2v" in name or "vace" in name else {}
        shots.append({"id": name.replace(".", "-"), "prompt": "a red circle"} | image)
        config = yaml.safe_load((folder / f"{name}.yaml").read_text()) | {"fps": 16}  # a film has one rate
        (folder / f"{name}-film.yaml").write_text(yaml.safe_dump(config))
        shots[-1]["config"] = str(folder / f"{name}-film.yaml")
    board = {
        "title": "All", "width": 64, "height": 64,
        "defaults": {"steps": STEPS, "spectrum": "off", "frames": 5, "seed": 0}, "shots": shots,
    }  # fmt: skip
    path = folder / "all.yaml"
    path.write_text(yaml.safe_dump(board))
    film = ["storyboard", str(path), "--out", str(folder / "film")]
    interrupted(folder, "begins", *film)
    finished(folder, *film)
    for name in IN_MANY_STEPS:
        (shot,) = (folder / "film" / "shots").glob(f"{name.replace('.', '-')}-*.json")
        assert report(shot)["frames_sha256"] == undisturbed[name]


def test_the_stand_ins_are_what_the_configs_name(folder: Path) -> None:
    """Nothing is fetched, and no config is left out."""
    for name in IN_MANY_STEPS:
        repository = load_config(str(folder / f"{name}.yaml")).model
        assert (folder / "cache" / "hub" / f"models--{repository.replace('/', '--')}").is_dir()
