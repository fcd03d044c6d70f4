"""VAE decoding as a stream of frames: only one chunk of the video is in memory at a time.

Whole frames are decoded on the first rank, or on all ranks in strips that get their neighbours' rows. Tiles
are distributed over the ranks, each of which keeps the causal feature caches of its own tiles; the first rank
blends them, as `AutoencoderKLWan.tiled_decode` does.

Tensor legend: B batch, C latent channels, F latent frames, T pixel frames of one chunk, H, W height and
width, 3 colours (or colours of several pixels: see `patch_size`).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from runtime.models.family import At
from runtime.models.wan.halo import on_strips
from runtime.models.wan.parts import HALO, Parts, bytes_of_whole, choose_parts, name_of
from runtime.parallel.collectives import Peers, numel
from runtime.parallel.devices import free_memory
from runtime.parallel.offloading import Visitor
from runtime.parallel.ranks import Ranks
from runtime.parallel.strips import Strips
from runtime.request.config import Config, Tiles

log = logging.getLogger(__name__)


class WanDecoder:
    """VAE of one rank group, on the device while it works.

    Args:
        vae: a Wan VAE. For whole frames only the first rank needs one.
        config, ranks: config of the model, and the ranks.
    """

    def __init__(self, vae: AutoencoderKLWan | None, config: Config, ranks: Ranks):
        self.vae = vae
        self._config, self._ranks = config, ranks
        moves = vae is not None and ranks.device.type != "cpu"
        self._visitor = Visitor(vae, ranks.device) if moves and vae is not None else None
        self.rest(config.memory.vae)

    def rest(self, where: str) -> None:
        """Have the VAE rest there from now on while it does not work; undecided, it is offloaded.

        Args:
            where: value of `memory.vae`.
        """
        self._stays = where == "keep"
        if self._stays and self._visitor is not None:
            self._visitor.come()
        self._leave()

    @contextmanager
    def at_work(self) -> Iterator[AutoencoderKLWan | None]:
        """Hold the VAE on the device within the context; yields None on ranks that have none."""
        if self._visitor is not None:
            self._visitor.come()
        try:
            yield self.vae
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._visitor is not None and not self._stays:
            self._visitor.leave()

    @torch.no_grad()
    def frames(self, latents_BCFHW: torch.Tensor, at: At) -> Generator[torch.Tensor]:
        """Decode latents into frames in temporal order, on the first rank; see `decode_frames`."""
        with self.at_work() as vae:

            def fits() -> bool:
                return vae is None or bytes_of_whole(vae, latents_BCFHW) <= free_memory(self._ranks.device)

            parts = choose_parts(self._config, self._ranks.size, fits)
            log.info("decoding %s", name_of(parts))
            peers = self._ranks.leading(latents_BCFHW.shape[3]) if parts == HALO else self._ranks.everyone
            if peers is not None:
                yield from decode_frames(vae, latents_BCFHW, parts, peers, at)


def _nowhere(*, busy: bool) -> None:
    pass


@torch.no_grad()
def decode_frames(
    vae: AutoencoderKLWan | None,
    latents_BCFHW: torch.Tensor,
    parts: Parts = None,
    peers: Peers | None = None,
    at: At = _nowhere,
) -> Iterator[torch.Tensor]:
    """Decode normalised latents into frames, in temporal order.

    The concatenation along time is bit-equal to the output of `WanPipeline` for the same latents, with its
    VAE's tiling enabled for tiles, whatever the number of ranks; strips differ from whole frames by rounding.

    Args:
        vae: a Wan VAE; in use until the iterator is exhausted or closed. For whole frames only the first rank
            needs one.
        latents_BCFHW: denoised latents, normalised per channel, in any dtype, the same on every rank.
        parts: what the ranks decode.
        peers: the ranks; all of them call this function. For strips, at most as many as rows of latents.
        at: called whenever this rank changes between work of its own and a transfer.

    Yields:
        Frames `[B, T, H, W, 3]` in [0, 1], in the VAE's dtype; T is 1 first, then the VAE's temporal factor.
        On the first rank only.
    """
    peers = peers or Peers.alone()
    if parts is None and peers.rank != 0:
        return
    assert vae is not None
    latents = latents_BCFHW.to(vae.device, vae.dtype)
    per_channel = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(per_channel).to(latents)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(per_channel).to(latents)
    latents = latents / inverse_std + mean
    if parts == HALO:
        chunks = _decode_strips(vae, latents, peers, at)
    elif parts is None or not _exceeds(vae, latents, parts):
        chunks = decode_chunks(vae, latents) if peers.rank == 0 else iter(())
    else:
        chunks = _decode_tiles(vae, latents, parts, peers, at)
    for chunk_B3THW in chunks:
        pixels = (chunk_B3THW.clamp(-1.0, 1.0) * 0.5 + 0.5).clamp(0.0, 1.0)
        yield pixels.permute(0, 2, 3, 4, 1)


def decode_chunks(vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode whole frames, one latent frame at a time.

    The concatenation of the chunks along time is what `AutoencoderKLWan._decode` computes before it clamps.

    Args:
        vae: a Wan VAE.
        latents_BCFHW: latents in the VAE's own scale (not normalised), on its device and in its dtype.

    Yields:
        Unclamped pixels `[B, 3, T, H, W]`, nominally in [-1, 1].
    """
    decoder = _CausalDecoder(vae)
    for hidden in torch.split(vae.post_quant_conv(latents_BCFHW), 1, dim=2):
        yield _unfold(vae, decoder.decode(hidden))


class _CausalDecoder:
    """Decoder of one area of the latents, frame by frame, with its feature cache.

    Source: `AutoencoderKLWan._decode`, which keeps the cache in the VAE.
    """

    def __init__(self, vae: AutoencoderKLWan):
        self._decoder = vae.decoder
        self._cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self._first = True

    def decode(self, hidden_BCFHW: torch.Tensor) -> torch.Tensor:
        """Decode the next latent frame, after `post_quant_conv`, to unclamped pixels `[B, 3, T, H, W]`."""
        pixels: torch.Tensor = self._decoder(
            hidden_BCFHW, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first
        )
        self._first = False
        return pixels


def _decode_strips(
    vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor, peers: Peers, at: At
) -> Iterator[torch.Tensor]:
    """Decode this rank's strip of each frame and send it to the first rank, which yields frames."""
    strips = Strips(latents_BCFHW.shape[3], peers)
    hidden_BCFHW = vae.post_quant_conv(strips.own(latents_BCFHW))
    decoder = _CausalDecoder(vae)
    with on_strips(vae.decoder, strips):
        for hidden in torch.split(hidden_BCFHW, 1, dim=2):
            strip = decoder.decode(hidden)
            at(busy=False)
            chunk = strips.collect(strip)
            at(busy=True)
            del strip
            if chunk is not None:
                yield _unfold(vae, chunk)


def _unfold(vae: AutoencoderKLWan, pixels_B3THW: torch.Tensor) -> torch.Tensor:
    """Unfold patches of pixels, which some VAEs decode as channels."""
    if vae.config.patch_size is None:
        return pixels_B3THW
    unfolded: torch.Tensor = unpatchify(pixels_B3THW, patch_size=vae.config.patch_size)
    return unfolded


def _exceeds(vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor, tiles: Tiles) -> bool:
    """Return whether a frame is larger than one tile."""
    size = tiles.size // vae.spatial_compression_ratio
    return any(length > size for length in latents_BCFHW.shape[3:])


@dataclass(frozen=True, slots=True)
class _Tiling:
    """Layout of tiles, in latents and in the decoder's output.

    Attributes:
        rows, columns: areas of the latents along height and width.
        shapes: height and width of each decoded tile, row by row.
        stride: rows and columns of a decoded tile that are kept.
        overlap: rows and columns that are blended with the tile before.
        height, width: size of the decoded frame.
    """

    rows: list[slice]
    columns: list[slice]
    shapes: list[tuple[int, int]]
    stride: int
    overlap: int
    height: int
    width: int

    @classmethod
    def of(cls, vae: AutoencoderKLWan, height: int, width: int, tiles: Tiles) -> _Tiling:
        factor = vae.spatial_compression_ratio
        scale = factor // (vae.config.patch_size or 1)
        size, stride = tiles.size // factor, tiles.stride // factor
        rows, columns = (
            [slice(start, min(start + size, length)) for start in range(0, length, stride)]
            for length in (height, width)
        )
        shapes = [((r.stop - r.start) * scale, (c.stop - c.start) * scale) for r in rows for c in columns]
        folded = vae.config.patch_size or 1
        kept, overlap = tiles.stride // folded, tiles.size // folded - tiles.stride // folded
        return cls(rows, columns, shapes, kept, overlap, height * scale, width * scale)

    @property
    def areas(self) -> list[tuple[slice, slice]]:
        """Areas of the latents of all tiles, row by row."""
        return [(row, column) for row in self.rows for column in self.columns]


def _decode_tiles(
    vae: AutoencoderKLWan, latents_BCFHW: torch.Tensor, tiles: Tiles, peers: Peers, at: At
) -> Iterator[torch.Tensor]:
    """Decode this rank's tiles of each frame and send them to the first rank, which yields blended frames."""
    tiling = _Tiling.of(vae, latents_BCFHW.shape[3], latents_BCFHW.shape[4], tiles)
    owners = [index % peers.size for index in range(len(tiling.areas))]
    mine = [index for index, owner in enumerate(owners) if owner == peers.rank]
    decoders = {index: _CausalDecoder(vae) for index in mine}
    temporal = vae.config.scale_factor_temporal
    for number, frame in enumerate(torch.split(latents_BCFHW, 1, dim=2)):
        own = [
            decoders[index].decode(vae.post_quant_conv(frame[..., rows, columns]))
            for index, (rows, columns) in enumerate(tiling.areas)
            if index in decoders
        ]
        lead = (frame.shape[0], vae.config.out_channels, temporal if number else 1)
        shapes: list[tuple[int, ...]] = [(*lead, *shape) for shape in tiling.shapes]
        at(busy=False)
        decoded = _send_to_first(own, owners, shapes, frame, peers)
        at(busy=True)
        if peers.rank == 0:
            yield _unfold(vae, _blend(decoded, tiling))


def _send_to_first(
    own: list[torch.Tensor],
    owners: list[int],
    shapes: list[tuple[int, ...]],
    like: torch.Tensor,
    peers: Peers,
) -> list[torch.Tensor]:
    """Gather all tiles on the first rank, in order; empty on the others."""
    nothing = like.new_empty(0)
    outgoing = torch.cat([nothing, *(tile.reshape(-1) for tile in own)])
    sizes = [numel(shape) for shape in shapes]
    owned = [sum(s for s, owner in zip(sizes, owners, strict=True) if owner == r) for r in range(peers.size)]
    pieces = [outgoing if rank == 0 else nothing for rank in range(peers.size)]
    arriving = [(length,) if peers.rank == 0 else (0,) for length in owned]
    arrived = peers.all_to_all(pieces, arriving)
    if peers.rank != 0:
        return []
    queues = [
        iter(piece.split_with_sizes([s for s, owner in zip(sizes, owners, strict=True) if owner == rank]))
        for rank, piece in enumerate(arrived)
    ]
    return [next(queues[owner]).view(shape) for owner, shape in zip(owners, shapes, strict=True)]


def _blend(decoded: list[torch.Tensor], tiling: _Tiling) -> torch.Tensor:
    """Blend tiles into a frame, in place and in the order of `AutoencoderKLWan.tiled_decode`."""
    columns = len(tiling.columns)
    rows = [decoded[start : start + columns] for start in range(0, len(decoded), columns)]
    strips: list[torch.Tensor] = []
    for above, row in zip([None, *rows], rows, strict=False):
        parts: list[Any] = []
        for column, tile in enumerate(row):
            if above is not None:
                tile = fade(above[column], tile, tiling.overlap, axis=-2)  # noqa: PLW2901
            if column > 0:
                tile = fade(row[column - 1], tile, tiling.overlap, axis=-1)  # noqa: PLW2901
            parts.append(tile[..., : tiling.stride, : tiling.stride])
        strips.append(torch.cat(parts, dim=-1))
    return torch.cat(strips, dim=3)[..., : tiling.height, : tiling.width]


def fade(before: torch.Tensor, tile: torch.Tensor, overlap: int, axis: int) -> torch.Tensor:
    """Blend the beginning of `tile` with the end of the tile `before`, in place.

    The result is bit-equal to the VAE's own `blend_v` and `blend_h`, which launch kernels for every row.

    Args:
        before, tile: tiles `[B, C, T, H, W]`.
        overlap: number of rows or columns that are blended.
        axis: axis along which the tiles are adjacent: −2 for H, −1 for W.
    """
    extent = min(before.shape[axis], tile.shape[axis], overlap)
    shares = torch.arange(extent, dtype=torch.float64, device=tile.device) / extent
    row, rest = (weights.float().view((-1, 1) if axis == -2 else (-1,)) for weights in (shares, 1 - shares))
    old, new = before.narrow(axis, before.shape[axis] - extent, extent), tile.narrow(axis, 0, extent)
    new.copy_(
        (old * rest).to(tile.dtype) + (new * row).to(tile.dtype)
    )  # products in float32, as with Python's numbers
    return tile
