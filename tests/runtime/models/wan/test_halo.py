"""Strips of frames on several ranks are decoded and encoded to what whole frames give on one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from runtime.engine import Engine
from runtime.media.mp4 import FrameBuffer, Frames
from runtime.models.wan.halo import on_strips
from runtime.models.wan.parts import HALO, bytes_of_whole, choose_parts
from runtime.models.wan.shared_encoder import SharedEncoder, encode_strips
from runtime.models.wan.vae import decode_frames
from runtime.parallel.collectives import Peers
from runtime.parallel.ranks import Ranks
from runtime.parallel.strips import Strips
from runtime.parallel.topology import Degrees
from runtime.rehearsal.fake import DEVICE, FakeDevice
from runtime.rehearsal.machine import load_gpu
from runtime.rehearsal.peers import FakePeers
from runtime.rehearsal.rehearse import Scenario, every_kind, rehearse
from runtime.request.config import EMBEDDED_MODELS, Config, Tiles
from runtime.request.video_request import VideoRequest
from tests.conditioned import config_of, write_i2v, write_image
from tests.ranks import WarmRanks

NEAR = 1e-5
SMALL: dict[str, Any] = {"width": 64, "height": 48, "frames": 9, "steps": 2, "max_sequence_length": 512}
SIZES = {2: [(7, 5), (4, 6)], 3: [(7, 5)], 4: [(7, 5), (3, 4)]}  # of latents; three rows for four ranks
KINDS = ("plain", "residual")
LARGE: dict[str, dict[str, Any]] = {
    "plain": {},  # Wan2.1's
    "residual": {
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}  # fmt: skip
"""Settings of Wan's own VAEs."""


def load(kind: str) -> AutoencoderKLWan:
    """The VAE of wan-tiny, which is like Wan2.1's, or a random one that is like Wan2.2's."""
    if kind == "plain":
        return AutoencoderKLWan.from_pretrained(EMBEDDED_MODELS / "wan-tiny" / "vae", dtype=torch.float32)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
        temperal_downsample=[False, True, True], is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 16, latents_std=[0.7] * 16,
    )  # fmt: skip
    return vae.eval()


def latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 16, 3, height, width, generator=torch.Generator().manual_seed(0))


def pixels(vae: AutoencoderKLWan, height: int, width: int, frames: int) -> torch.Tensor:
    scale, numbers = vae.spatial_compression_ratio, torch.Generator().manual_seed(1)
    return torch.rand(1, 3, frames, height * scale, width * scale, generator=numbers) * 2 - 1


def parts_of(vae: AutoencoderKLWan) -> list[type[nn.Module]]:
    return [type(part) for part in vae.modules()]


@torch.no_grad()
def code(ranks: Ranks, kind: str, sizes: Sequence[tuple[int, int]]) -> list[Any]:
    """Frames that are decoded together, and latents that are encoded together; empty on other ranks."""
    vae, found = load(kind), []
    before = parts_of(vae)
    for size in sizes:
        peers = ranks.leading(size[0])
        frames = [] if peers is None else list(decode_frames(vae, latents(*size), HALO, peers))
        encoded: list[torch.Tensor] = []

        def encode(shared: SharedEncoder, size: tuple[int, int] = size, to: Any = encoded) -> None:
            for length in (1, 9):
                to.append(shared.encode(pixels(vae, *size, length)).latent_dist.parameters)

        SharedEncoder(vae, ranks).run(encode)
        found.append((frames, encoded))
    assert parts_of(vae) == before
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", SIZES)
@torch.no_grad()
def test_strips_are_the_whole(world: int, kind: str, warm: WarmRanks) -> None:
    vae, (first, *others) = load(kind), warm.run(world, code, kind, SIZES[world])
    for (frames, encoded), size in zip(first, SIZES[world], strict=True):
        whole = torch.cat(list(decode_frames(vae, latents(*size))), dim=1)
        assert whole.std() > 0.02
        torch.testing.assert_close(torch.cat(frames, dim=1), whole, atol=NEAR, rtol=0)
        assert [chunk.shape[1] for chunk in frames] == [1, 4, 4]
        for moments, length in zip(encoded, (1, 9), strict=True):
            expected = vae.encode(pixels(vae, *size, length)).latent_dist.parameters
            torch.testing.assert_close(moments, expected, atol=NEAR, rtol=NEAR)
    assert all(of_size == ([], []) for of_rank in others for of_size in of_rank)


def decoded_by(kind: str, rank: int, world: int) -> tuple[int, int, int]:
    """Operations and memory of a rank that decodes in strips at 720p, and the memory that is estimated."""
    fake, dtype = FakeDevice(), torch.float32
    vae = fake.module(lambda: AutoencoderKLWan(**LARGE[kind]), lambda *_: dtype)
    scale, peers = vae.spatial_compression_ratio, FakePeers(rank, world)
    with fake.running() as ledger:
        latents_BCFHW = torch.empty(1, vae.config.z_dim, 3, 704 // scale, 1280 // scale, device=DEVICE)
        ledger.start()
        for chunk in decode_frames(vae, latents_BCFHW, HALO if world > 1 else None, peers):
            del chunk
        held = bytes_of_whole(vae, latents_BCFHW)
        work, memory = ledger.finish()
    return sum(work.flops.values()), memory.activations, held


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_all_operations_and_memory(kind: str) -> None:
    """44 and 88 rows of latents, which four ranks share evenly."""
    flops, held, estimated = decoded_by(kind, 0, 1)
    assert held < estimated < 2 * held
    shares = [decoded_by(kind, rank, 4) for rank in ((0, 1) if kind == "plain" else (1,))]
    for of_rank, memory, _ in shares:
        assert of_rank == flops / 4
        assert memory < 1.1 * held / 4


def in_strips(config: Config) -> Config:
    return config.model_copy(update={"decode": HALO})


def test_auto_takes_strips_on_ranks_and_whole_frames_where_they_fit(config: Config) -> None:
    auto, tiles = config.model_copy(update={"decode": "auto"}), Tiles(size=32, stride=24)
    fits, tight = (lambda: True), (lambda: False)
    assert choose_parts(auto, 2, tight) == HALO
    assert choose_parts(auto, 1, fits) is None
    assert choose_parts(auto, 1, tight) == Tiles()
    assert choose_parts(auto.model_copy(update={"tiles": tiles}), 1, tight) == tiles
    assert choose_parts(in_strips(config), 1, fits) is None


def test_a_part_that_needs_more_rows_is_refused() -> None:
    strips = Strips(4, Peers.alone())
    for part in (nn.Conv2d(3, 3, 5, padding=2), nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.ZeroPad2d(1)):
        with pytest.raises(TypeError, match="needs other rows"), on_strips(nn.Sequential(part), strips):
            pass


@torch.no_grad()
def make(ranks: Ranks, config: Config, image: str | None) -> Frames | None:
    """A video that the ranks make together; None on others than the first."""
    engine, sink = Engine(config, ranks, Degrees(cfg=ranks.size)), FrameBuffer()
    request = engine.config.request("a red circle", image=image, **SMALL)
    engine.generate(request, [sink] if ranks.is_leader else [])
    return sink.frames if ranks.is_leader else None


def test_ranks_make_the_video_of_one(config: Config, tmp_path: Path, warm: WarmRanks) -> None:
    """With an image, whose frames are encoded in strips, too."""
    image = str(write_image(tmp_path / "start.png"))
    i2v = config_of(config, write_i2v(tmp_path / "i2v"))
    for own, given in ((config, None), (i2v, image)):
        alone = make(Ranks.alone(torch.device("cpu")), own, given)
        together = warm.run(2, make, in_strips(own), given)
        assert alone is not None and together[1] is None
        assert np.abs(alone.astype(int) - together[0]).max() <= 1  # of 255: rounded to another number


@torch.no_grad()
def sent(ranks: Ranks, request: VideoRequest) -> tuple[int, int]:
    """Bytes that a rank sends to encode and to decode a video."""
    vae, (height, width) = load("plain"), (request.height, request.width)
    shape, counts = (1, 3, request.frames, height, width), [ranks.traffic.sent]
    encode_strips(vae, torch.zeros(shape) if ranks.is_leader else None, shape, ranks.everyone)
    counts.append(ranks.traffic.sent)
    of_latents = (1, 16, (request.frames + 3) // 4, height // 8, width // 8)
    for _ in decode_frames(vae, torch.zeros(of_latents), HALO, ranks.everyone):
        pass
    return counts[1] - counts[0], ranks.traffic.sent - counts[1]


def test_a_rehearsal_tells_the_bytes_that_are_sent(config: Config, tmp_path: Path, warm: WarmRanks) -> None:
    """Of five latent frames and ten rows, which do not divide."""
    i2v = in_strips(config_of(config, write_i2v(tmp_path)).model_copy(update={"window": None}))
    request = i2v.request("x", **SMALL | {"height": 80, "frames": 17}, image="made up", spectrum="off")
    scenario = Scenario(i2v, request, Degrees(), 3, load_gpu("h100"))
    found = rehearse(scenario, [0, 1, 2]).ranks
    told = [tuple(one.sent["everyone"] for one in (rank.encode, rank.decode)) for rank in found]
    assert told == warm.run(3, sent, request)
    assert every_kind(scenario) == [0, 1, 2]
