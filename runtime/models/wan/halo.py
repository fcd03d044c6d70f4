"""The VAE on strips: each rank decodes or encodes consecutive rows of every frame.

Each convolution gets a row of each neighbour (its halo), attention the keys and values of the whole frame.
All other parts of a VAE, its caches included, treat each position by itself. So results differ from those of
whole frames by rounding alone.

Source of the layers: `diffusers.models.autoencoders.autoencoder_kl_wan`.

Tensor legend: B batch, C channels, T frames, H rows of a strip, W columns, N frames of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanAttentionBlock, WanCausalConv3d
from torch import nn

from runtime.parallel.strips import Strips


@contextmanager
def on_strips(coder: nn.Module, strips: Strips) -> Iterator[None]:
    """Within the context a VAE's encoder or decoder takes and gives this rank's strip of a frame.

    Every rank runs it in the same order, on one video from its first frame on. The parts that need other rows
    are replaced meanwhile; weights stay where they are.
    """
    replaced = []
    for name, part in list(coder.named_modules()):
        make = _replacement(part)
        if make is not None:
            at, _, leaf = name.rpartition(".")
            replaced.append((coder.get_submodule(at), leaf, part))
            setattr(coder.get_submodule(at), leaf, make(part, strips))
    try:
        yield
    finally:
        for owner, leaf, part in replaced:
            setattr(owner, leaf, part)


class _CausalConv(nn.Module):
    """`WanCausalConv3d` of 3×3 rows and columns."""

    def __init__(self, conv: WanCausalConv3d, strips: Strips):
        super().__init__()
        self._conv, self._strips = conv, strips
        self._seen: list[torch.Tensor] = []  # rows around the frames that were seen last

    def forward(self, x_BCTHW: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """As of `WanCausalConv3d`, whose cache holds the last frames that it was given."""
        conv, around = self._conv, list(self._strips.around(x_BCTHW))
        columns, _, _, _, before, _ = conv._padding
        cached = 0 if cache_x is None else cache_x.shape[2]
        batch, channels, time, height, width = x_BCTHW.shape
        whole = x_BCTHW.new_zeros(batch, channels, before + time, height + 2, width)  # made in one piece
        whole[:, :, before:, 1:-1] = x_BCTHW
        if cache_x is not None:
            whole[:, :, before - cached : before, 1:-1] = cache_x
            around = [torch.cat(rows, dim=2) for rows in zip(self._seen, around, strict=True)]
        for row, rows in zip((0, height + 1), around, strict=True):
            whole[:, :, before - cached :, row : row + 1] = rows[:, :, -cached - time :]
        self._seen = [rows[:, :, -CACHE_T:].clone() for rows in around]
        return F.conv3d(whole, conv.weight, conv.bias, conv.stride, (0, 0, columns))


class _Conv(nn.Module):
    """Convolution of 3×3 rows and columns, without a stride."""

    def __init__(self, conv: nn.Conv2d, strips: Strips):
        super().__init__()
        self._conv, self._strips = conv, strips

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        above, below = self._strips.around(x_NCHW)
        whole = torch.cat([above, x_NCHW, below], dim=-2)
        return F.conv2d(whole, self._conv.weight, self._conv.bias, padding=(0, 1))


class _Pad(nn.Module):
    """Padding by a row below and a column to the right, before a convolution with a stride of 2."""

    def __init__(self, pad: nn.ZeroPad2d, strips: Strips):
        super().__init__()
        self._strips = strips

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        return F.pad(torch.cat([x_NCHW, self._strips.below(x_NCHW)], dim=-2), (0, 1))


class _Attention(nn.Module):
    """`WanAttentionBlock`: the queries of a strip, and the keys and values of the whole frame."""

    def __init__(self, block: WanAttentionBlock, strips: Strips):
        super().__init__()
        self._block, self._strips = block, strips

    def forward(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        block, (batch, channels, time, height, width) = self._block, x_BCTHW.shape
        x_NCHW = x_BCTHW.transpose(1, 2).reshape(batch * time, channels, height, width)
        qkv = block.to_qkv(block.norm(x_NCHW)).reshape(batch * time, 1, 3 * channels, -1).transpose(-1, -2)
        query, own = qkv.contiguous().split([channels, 2 * channels], dim=-1)
        key, value = self._strips.gather(own, axis=2).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: torch.Tensor = block.proj(attended.squeeze(1).transpose(1, 2).reshape(x_NCHW.shape))
        return projected.view(batch, time, channels, height, width).transpose(1, 2) + x_BCTHW


def _replacement(part: nn.Module) -> Callable[[Any, Strips], nn.Module] | None:
    """What takes the place of a part that needs other rows; None for one that does not.

    Raises:
        TypeError: the part needs them in a way that is not known here.
    """
    match part:
        case WanAttentionBlock():
            return _Attention
        case WanCausalConv3d(kernel_size=(_, 3, 3), stride=(1, 1, 1), _padding=(1, 1, 1, 1, _, 0)):
            return _CausalConv
        case nn.Conv2d(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)):
            return _Conv
        case nn.ZeroPad2d(padding=(0, 1, 0, 1)):
            return _Pad
        case (
            nn.Conv2d(padding=(0, 0)) | WanCausalConv3d(kernel_size=(_, 1, 1))
        ):  # after a pad, or of one position
            return None
        case nn.ZeroPad2d() | nn.Conv2d() | WanCausalConv3d():
            raise TypeError(f"{part} needs other rows than the nearest")
        case _:
            return None
