"""Streaming decode gives what the VAE gives in one piece, whole or in tiles, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from runtime.models.wan.vae import decode_frames, fade
from runtime.parallel.ranks import Ranks
from runtime.request.config import EMBEDDED_MODELS, Tiles
from tests.ranks import WarmRanks

TILES = Tiles(size=32, stride=24)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    return load()


def load() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(EMBEDDED_MODELS / "wan-tiny" / "vae", dtype=torch.float32).eval()


def latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 16, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_one_piece(vae: AutoencoderKLWan, normalised: torch.Tensor) -> torch.Tensor:
    """As `WanPipeline` decodes."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    sample = vae.decode(normalised / std + mean).sample
    return VideoProcessor().postprocess_video(sample, output_type="pt").permute(0, 1, 3, 4, 2)


def test_chunks_are_the_whole_decode(vae: AutoencoderKLWan) -> None:
    chunks = list(decode_frames(vae, latents(4, 6)))
    assert [chunk.shape[1] for chunk in chunks] == [1, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=1), in_one_piece(vae, latents(4, 6)))


def test_a_decode_given_up_half_way_leaves_the_vae_clean(vae: AutoencoderKLWan) -> None:
    whole = list(decode_frames(vae, latents(4, 6)))
    begun = decode_frames(vae, latents(4, 6))
    next(begun)
    del begun
    again = list(decode_frames(vae, latents(4, 6)))
    assert torch.equal(torch.cat(whole, 1), torch.cat(again, 1))


def tiled_in_one_piece(normalised: torch.Tensor) -> torch.Tensor:
    vae = load()
    vae.enable_tiling(TILES.size, TILES.size, TILES.stride, TILES.stride)
    return in_one_piece(vae, normalised)


@pytest.mark.parametrize("size", [(12, 9), (7, 5), (3, 10)])
def test_tiles_are_those_of_the_vae_itself(vae: AutoencoderKLWan, size: tuple[int, int]) -> None:
    expected = tiled_in_one_piece(latents(*size))
    assert torch.equal(torch.cat(list(decode_frames(vae, latents(*size), TILES)), 1), expected)
    assert not torch.equal(expected, in_one_piece(vae, latents(*size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_fade_as_the_vae_blends_them(vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(0)
    for height, width in ((32, 32), (8, 24), (5, 32)):
        sizes = ((32, width), (height, 32), (height, width))
        above, left, tile = (torch.randn(2, 3, 4, *size, generator=numbers).to(dtype) for size in sizes)
        expected = vae.blend_h(left, vae.blend_v(above, tile.clone(), 8), 8)
        assert torch.equal(fade(left, fade(above, tile, 8, axis=-2), 8, axis=-1), expected)


def test_a_frame_within_one_tile_is_decoded_whole(vae: AutoencoderKLWan) -> None:
    frames = torch.cat(list(decode_frames(vae, latents(4, 4), TILES)), 1)
    assert torch.equal(frames, in_one_piece(vae, latents(4, 4)))


def share(ranks: Ranks, sizes: list[tuple[int, int]]) -> list[list[torch.Tensor]]:
    vae = load()
    return [list(decode_frames(vae, latents(*size), TILES, ranks.everyone)) for size in sizes]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_share_the_tiles_make_the_same_frames(world: int, warm: WarmRanks) -> None:
    sizes = [(12, 9), (5, 4)]  # 12 tiles; 4 tiles of several sizes
    first, *others = warm.run(world, share, sizes)
    for chunks, size in zip(first, sizes, strict=True):
        assert torch.equal(torch.cat(chunks, 1), tiled_in_one_piece(latents(*size)))
    assert all(chunks == [] for of_rank in others for chunks in of_rank)  # who does not write has no frame


def test_more_ranks_than_tiles(warm: WarmRanks) -> None:
    first = warm.run(4, share, [(5, 3)])[0]
    assert torch.equal(torch.cat(first[0], 1), tiled_in_one_piece(latents(5, 3)))
