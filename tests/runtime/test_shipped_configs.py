"""Every shipped config on small stand-ins for its weights: on one and many ranks, stopped and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import CancelledError
from runtime.media.mp4 import Frames
from runtime.parallel.ranks import Ranks
from runtime.request.config import load_config
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from tests.conditioned import write_image
from tests.ranks import run_ranks
from tests.repositories import OF_EACH_MODEL, SHIPPED, write_config, write_stand_in

STEPS, STOPPED = 6, 0


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every shipped config for a stand-in that lies beside it, and an image."""
    folder = tmp_path_factory.mktemp("configs")
    write_image(folder / "image.png")
    for name in SHIPPED:
        model = folder / load_config(name).model
        if not model.is_dir():
            write_stand_in(load_config(name).model, model)
        write_config(name, folder, model=str(model))
    return folder


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.bytes = b""

    def write(self, frames: Frames) -> None:
        self.bytes += frames.tobytes()


def asked(name: str, folder: Path) -> VideoRequest:
    config = load_config(str(folder / f"{name}.yaml"))
    image = str(folder / "image.png") if "i2v" in name or "vace" in name else None
    steps = config.scheduler.steps or STEPS
    return config.request("a red circle", width=64, height=64, frames=5, steps=steps, image=image)


def made(
    engine: Engine, request: VideoRequest, folder: Path, *, stop: bool, resume: bool
) -> tuple[bytes, int]:
    """The video's bytes, and the step at which it was resumed; none of one that was stopped."""
    sinks = [Kept()] if engine.ranks.is_leader else []
    kept = Checkpoints(folder, every=1, resume=resume)

    def on_step(record: StepRecord) -> None:
        if stop and record.index == STOPPED:
            engine.command(Command.STOP)

    try:
        result = engine.generate(request, [*sinks], on_step, kept)
    except CancelledError:
        return b"", -1
    return b"".join(sink.bytes for sink in sinks), result.resumed_at


def on_ranks(ranks: Ranks, names: list[str], folder: Path) -> list[tuple[bytes, bytes, int]]:
    """Each config's video, the one that was interrupted, and where that was resumed."""
    found = []
    for name in names:
        request = asked(name, folder)
        engine = Engine(load_config(str(folder / f"{name}.yaml")), ranks)
        checkpoints = folder / f"{name}-{ranks.size}"
        whole, _ = made(engine, request, checkpoints / "whole", stop=False, resume=False)
        assert made(engine, request, checkpoints / "cut", stop=True, resume=False) == (b"", -1)
        cut, resumed_at = made(engine, request, checkpoints / "cut", stop=False, resume=True)
        found.append((whole, cut, resumed_at))
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("world", "names"), [(1, SHIPPED), (2, OF_EACH_MODEL), (4, SHIPPED[:2])])
def test_each_runs_and_resumes_on_any_ranks(configs: Path, world: int, names: list[str]) -> None:
    for whole, cut, resumed_at in run_ranks(world, on_ranks, names, configs)[0]:
        assert whole == cut and len(whole) == 5 * 64 * 64 * 3
        assert STOPPED < resumed_at < STEPS


def identities(folder: Path) -> dict[str, str]:
    """What each config's generation is a function of."""
    found = {}
    for name in SHIPPED:
        engine = Engine(load_config(str(folder / f"{name}.yaml")))
        found[name] = engine.prepare(engine.plan(asked(name, folder))).recipe.text
    return found


@pytest.mark.timeout(240)
def test_what_a_result_is_a_function_of_is_the_same_in_every_process(configs: Path) -> None:
    """diffusers keeps a list in a sampler's config in the order of a set: that of the process's hash seed."""
    code = "import sys; from tests.runtime.test_shipped_configs import *; "
    code += "print(json.dumps(identities(Path(sys.argv[1]))))"
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"  # another one than this process has
    other = subprocess.run(
        [sys.executable, "-c", code, str(configs)],
        env=os.environ | {"PYTHONHASHSEED": seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(other.stdout) == identities(configs)
