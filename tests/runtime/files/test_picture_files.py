"""Images that users give: upright, whole, read once, or refused with what is wrong."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from runtime.engine import Engine
from runtime.errors import BadRequestError
from runtime.jobs.run import do_job
from runtime.media.mp4 import FrameBuffer
from runtime.parallel.ranks import Ranks
from runtime.request.config import Config, load_config
from runtime.request.images import Picture, check_image, image_digest, read_picture
from runtime.request.outputs import Outputs
from tests.conditioned import config_of, write_i2v, write_image
from tests.jobs import job_of
from tests.ranks import run_ranks

ORIENTATION = 0x0112


def gradient() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC)


def pixels(picture: Picture) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    gradient().save(path.with_suffix(".jpg"), exif=exif)
    path.with_suffix(".jpg").rename(path)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: gradient().save(path, "PNG"),
        lambda path: gradient().save(path, "WEBP"),
        lambda path: gradient().convert("L").save(path, "PNG"),
        lambda path: gradient().convert("1").save(path, "PNG"),
        lambda path: gradient().convert("P").save(path, "PNG"),
        lambda path: gradient().convert("P").save(path, "PNG", transparency=0),
        lambda path: gradient().convert("RGBA").save(path, "PNG"),
        lambda path: gradient().convert("CMYK").save(path, "JPEG"),
        lambda path: gradient().save(path, "GIF", save_all=True, append_images=[gradient().rotate(90)]),
        save_turned,
    ],
)
def test_pixels_are_those_that_diffusers_loads(tmp_path: Path, save: Callable[[Path], None]) -> None:
    path = tmp_path / "it.png"  # whatever it holds: the name does not count
    save(path)
    picture = read_picture(str(path))
    assert np.array_equal(pixels(picture), np.asarray(load_image(str(path))).astype(int))


def test_a_photo_lies_as_its_camera_was_held(tmp_path: Path) -> None:
    save_turned(tmp_path / "phone")
    assert read_picture(str(tmp_path / "phone")).image.size == (64, 96)


@pytest.mark.parametrize("kind", ["png", "tiff", "float"])
def test_more_than_8_bits_are_scaled(tmp_path: Path, kind: str) -> None:
    """Pillow's own conversion makes them white."""
    gray = np.asarray(gradient().convert("L"))
    path = tmp_path / f"gray.{'png' if kind == 'png' else 'tiff'}"
    Image.fromarray(gray.astype(np.float32) / 255 if kind == "float" else gray.astype(np.uint16) * 257).save(
        path
    )
    assert np.abs(pixels(read_picture(str(path))) - gray[..., None]).max() <= 1


def huge(side: int) -> bytes:
    """A PNG that says that it is large, and is not."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def half(path: Path, kind: str) -> None:
    gradient().resize((480, 320)).save(path, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: half(path, "JPEG"), "it cannot be read: "),
        (lambda path: half(path, "PNG"), "it cannot be read: "),
        (lambda path: path.write_bytes(huge(14000)), "it has 196000000 pixels, the limit is 178956970"),
        (lambda path: path.write_bytes(huge(50)), "it cannot be read: "),
        (lambda path: path.write_bytes(EPS), "it is not an image of a supported format (PNG, JPEG"),
        (lambda path: path.write_text("hello"), "it is not an image of a supported format"),
        (lambda path: path.touch(), "it is not an image of a supported format"),
        (lambda path: path.mkdir(), "it is not a regular file"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: None, "it cannot be read: No such file"),
        (
            lambda path: Image.fromarray(np.full((8, 8), 7.5, np.float32)).save(path, "TIFF"),
            "float values outside 0 … 1",
        ),
        (
            lambda path: Image.fromarray(np.full((8, 8), 10**6, np.int32)).save(path, "TIFF"),
            "its values range from 1e+06 to 1e+06",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, make: Callable[[Path], object], said: str) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(BadRequestError, match="image: ") as caught:
        check_image(str(path))
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    """A few hundred broken files: no error but ours."""
    generator = np.random.default_rng(0)
    path = tmp_path / "it"
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        gradient().save(path, kind)
        whole = path.read_bytes()
        for _ in range(40):
            broken = bytearray(whole)
            for place in generator.integers(0, len(broken), 4):
                broken[place] = generator.integers(256)
            path.write_bytes(broken[: generator.integers(1, len(broken) + 1)])
            try:
                read_picture(str(path))
            except BadRequestError as error:
                assert "\n" not in str(error)


def test_what_does_not_count_is_said(tmp_path: Path) -> None:
    gradient().convert("RGBA").rotate(45, expand=True).save(tmp_path / "alpha.png")
    gradient().save(tmp_path / "moving.gif", save_all=True, append_images=[gradient().rotate(180)])
    alpha, moving = (read_picture(str(tmp_path / name)) for name in ("alpha.png", "moving.gif"))
    assert "transparency is ignored" in alpha.warnings(*alpha.image.size)[0]
    assert "only its first frame is used" in moving.warnings(96, 64)[0]
    assert moving.warnings(64, 64)[1].endswith(
        "is 96×64 and was stretched to 64×64; crop it to that aspect ratio, or request a video with its own"
    )
    gradient().save(tmp_path / "plain.png")
    assert read_picture(str(tmp_path / "plain.png")).warnings(480, 320) == []


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_of(load_config("wan-tiny"), write_i2v(tmp_path_factory.mktemp("i2v")))


def one_bad_image_in_the_middle(ranks: Ranks, config: Config, folder: str) -> list[str]:
    """Three jobs on one group; the second's image is broken where only the first rank can see it."""
    engine, told = Engine(config, ranks), []
    for number, name in enumerate(("good", "broken", "good")):
        request = config.request(
            "a red circle", image=f"{folder}/{name}", width=64, height=48, frames=5, steps=1, spectrum="off"
        )
        out = Path(folder) / f"{number}.mp4"
        try:
            do_job(engine, job_of(engine, request, Outputs.named(out)))
            told.append("done")
        except BadRequestError as error:
            told.append(str(error))
        sinks = [FrameBuffer()] if ranks.is_leader else []
        try:  # without a job around it, as calibrations do
            engine.generate(request, sinks)
        except BadRequestError as error:
            told.append(str(error))
    return told


@pytest.mark.timeout(120)
def test_a_bad_image_costs_no_rank_group(own: Config, tmp_path: Path) -> None:
    write_image(tmp_path / "good.png").rename(tmp_path / "good")
    half(tmp_path / "broken", "JPEG")
    for told in run_ranks(2, one_bad_image_in_the_middle, own, str(tmp_path)):
        assert [told[0], told[3]] == ["done", "done"]
        assert all("broken' given; it cannot be read" in problem for problem in told[1:3])


def test_what_was_checked_is_what_is_used(own: Config, tmp_path: Path) -> None:
    """The file changes after the door: the picture that was looked at is made, and is in the identity."""
    path = write_image(tmp_path / "start.png")
    engine, frames = Engine(own), []
    request = own.request(
        "a red circle", image=str(path), width=64, height=48, frames=5, steps=1, spectrum="off"
    )
    for change in (lambda: None, path.unlink):
        write_image(path)
        digest = image_digest(str(path))
        sink = FrameBuffer()
        with engine.inputs.held(request):
            change()
            assert engine.prepare(engine.plan(request)).recipe.parts["image"] == digest
            engine.generate(request, [sink])
        frames.append(sink.frames)
    assert np.array_equal(*frames)
