"""A video that extends a finished one begins with its latents, and goes on from the last of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from runtime.checkpoint.folder import Checkpoints
from runtime.engine import Engine
from runtime.errors import BadRequestError, CancelledError
from runtime.jobs.job import Job
from runtime.jobs.run import run_job
from runtime.media.latents import continuing, read_latents, write_latents
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.parallel.topology import Degrees
from runtime.request.config import Config
from runtime.request.outputs import Outputs
from runtime.request.video_request import VideoRequest
from runtime.sampling.commands import Command
from runtime.sampling.denoise import StepRecord
from tests.conditioned import config_of, denoised, denoised_on, write_i2v, write_image, write_vace
from tests.ranks import run_ranks

Ask = Callable[..., VideoRequest]
SIZE = {"width": 64, "height": 48, "frames": 9, "steps": 4, "seed": 3, "spectrum": "off"}


@pytest.fixture(scope="module", params=[write_i2v, write_vace])
def own(request: pytest.FixtureRequest, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Models whose windows have 9 frames, 3 latent ones, and share at least one of these."""
    return config_of(config, request.param(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def extending(own: Config) -> Engine:
    return Engine(own)


@pytest.fixture(scope="module")
def ask(own: Config, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    image = write_image(tmp_path_factory.mktemp("image") / "start.png")
    Image.open(image).resize((64, 48)).save(image)

    def make(**fields: Any) -> VideoRequest:
        return own.request(**{"prompt": "a red circle", **SIZE, "image": str(image), **fields})

    return make


def kept(path: Path, latents: torch.Tensor, frames: int) -> str:
    write_latents(path, latents, frames)
    return str(path)


def shown(engine: Engine, request: VideoRequest, *more: Any) -> Frames:
    sink = FrameBuffer()
    engine.generate(request, [sink], *more)
    return sink.frames


@pytest.mark.parametrize("before", [5, 9, 13, 17])
def test_the_rest_of_a_long_video_is_that_of_the_video_itself(
    extending: Engine, ask: Ask, tmp_path: Path, before: int
) -> None:
    """Where its windows begin, there is no difference between extending a video and making it at once."""
    long = ask(frames=21)
    whole, count = denoised(extending, long), (before - 1) // 4 + 1
    known = continuing(kept(tmp_path / "known.safetensors", whole[:, :, :count], before))
    plan = extending.plan(ask(frames=21, extend=known))
    assert plan.windows.starts[0] == min(count - 1, 3) and plan.windows.total == 6
    made = denoised(extending, plan.request)
    assert torch.equal(made[:, :, :count], whole[:, :, :count])
    if before in (9, 13):  # the first window ends, and so does the second
        assert torch.equal(made, whole) == (before == 9)
    assert made.isfinite().all() and made.shape == whole.shape


def test_what_is_new_goes_on_from_what_there_is(extending: Engine, ask: Ask, tmp_path: Path) -> None:
    first, other = denoised(extending, ask()), denoised(extending, ask(seed=4))
    one, two = (
        denoised(
            extending, ask(frames=13, extend=continuing(kept(tmp_path / f"{name}.safetensors", latents, 9)))
        )
        for name, latents in (("first", first), ("other", other))
    )
    assert torch.equal(one[:, :, :3], first) and torch.equal(two[:, :, :3], other)
    assert not torch.equal(one[:, :, 3:], two[:, :, 3:])


def test_a_short_video_is_extended_within_one_window(extending: Engine, ask: Ask, tmp_path: Path) -> None:
    short = denoised(extending, ask(frames=5))
    known = continuing(kept(tmp_path / "short.safetensors", short, 5))
    plan = extending.plan(ask(extend=known))
    assert (plan.windows.starts, plan.segments) == ((0,), 1)
    assert torch.equal(denoised(extending, plan.request)[:, :, :2], short)


def job(own: Config, request: VideoRequest, folder: Path) -> Job:
    outputs = Outputs.named(folder / "a.mp4", latents=folder / "a.safetensors", overwrite=True)
    return Job.build(own, request, outputs, checkpoints=Checkpoints(folder / "kept", every=1)).planned()


def test_a_job_keeps_the_latents_that_the_next_one_extends(
    extending: Engine, own: Config, ask: Ask, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    run_job(extending, job(own, ask(), first))
    file = str(first / "a.safetensors")
    assert continuing(file).frames == 9
    assert torch.equal(read_latents(file).values_BCFHW, denoised(extending, ask()))
    longer = ask(prompt="a blue square", frames=17, extend=continuing(file))
    report = run_job(extending, job(own, longer, second))
    assert report.request["frames"] == 17 and report.request["extend"] == {"file": file, "frames": 9}
    assert continuing(str(second / "a.safetensors")).frames == 17
    assert np.array_equal(shown(extending, longer)[:9], shown(extending, ask()))
    planned = job(own, longer, second)
    write_latents(Path(file), denoised(extending, ask(seed=4)), 9)
    with pytest.raises(BadRequestError, match=r"has changed since it was planned: extended was"):
        run_job(extending, planned)


def test_an_interrupted_extension_is_resumed_in_the_same_bits(
    extending: Engine, ask: Ask, tmp_path: Path
) -> None:
    file = kept(tmp_path / "known.safetensors", denoised(extending, ask()), 9)
    request = ask(frames=21, spectrum="paper", extend=continuing(file))
    checkpoints = Checkpoints(tmp_path / "kept", every=1)
    expected = shown(extending, request)

    def cancel(step: StepRecord) -> None:
        if step.index == 5:
            extending.command(Command.CANCEL)

    with pytest.raises(CancelledError):
        extending.generate(request, [FrameBuffer()], cancel, checkpoints)
    sink = FrameBuffer()
    resumed = extending.generate(
        request, [sink], checkpoints=Checkpoints(checkpoints.root, every=1, resume=True)
    )
    assert resumed.resumed_at > 0 and np.array_equal(sink.frames, expected)


def test_many_ranks_extend_as_one_does(extending: Engine, own: Config, ask: Ask, tmp_path: Path) -> None:
    file = kept(tmp_path / "known.safetensors", denoised(extending, ask()), 9)
    request = ask(frames=13, extend=continuing(file))
    expected = denoised(extending, request)
    for latents in run_ranks(2, denoised_on, own, request, Degrees(ulysses=2)):
        assert (latents - expected).norm() < 1e-5 * expected.norm()


def test_what_cannot_be_extended_is_refused(
    extending: Engine, engine: Engine, ask: Ask, tmp_path: Path
) -> None:
    file = kept(tmp_path / "known.safetensors", denoised(extending, ask()), 9)
    known = continuing(file)
    with pytest.raises(BadRequestError, match="has 9 already"):
        ask(extend=known)
    with pytest.raises(BadRequestError, match="takes one prompt"):
        ask(frames=21, extend=known, travel=[{"at": 1.0, "prompt": "another"}])
    with pytest.raises(BadRequestError, match=r"extend.frames: 8 given; must be 4k \+ 1"):
        ask(frames=13, extend=known.model_copy(update={"frames": 8}).model_dump())
    with pytest.raises(BadRequestError, match="extended by the same model, in the same size"):
        denoised(extending, ask(width=48, frames=13, extend=known))
    with pytest.raises(BadRequestError, match="takes no latents to begin with"):
        engine.plan(engine.config.request("a red circle", **SIZE | {"frames": 13}, extend=known))
    text, foreign, odd = (tmp_path / name for name in ("a.txt", "b.safetensors", "c.safetensors"))
    text.write_text("nothing")
    save_file({"weight": torch.zeros(2)}, foreign)
    write_latents(odd, torch.full((1, 16, 3, 6, 8), torch.nan), 9)
    for path, said in (
        (text, "cannot be extended: it is no file of latents, as --latents writes one"),
        (foreign, "holds no latents"),
        (tmp_path / "d", "No such"),
    ):
        for read in (continuing, read_latents):
            with pytest.raises(BadRequestError, match=f"extend: '{path}' given.*{said}"):
                read(str(path))
    with pytest.raises(BadRequestError, match="not finite"):
        read_latents(str(odd))
