"""Wan's transformer as three pieces, embed → blocks → head, that together equal its own forward bit for bit.

The pieces are where a step can be cut: a forecast step runs only the head, which is `project` and
`unpatchify`, and ranks split the tokens between `embed` and `unpatchify`. What does not change during a
generation (text embedding, rotary table) is computed once.

Tensor legend: B batch, L tokens, D channels of the transformer, C latent channels, F latent frames, H, W
latent height and width, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn

from runtime.models.base import Geometry, Grid, Rotary, Tokens
from runtime.parallel.sharding import Weights, WholeWeights

Transformer: TypeAlias = WanTransformer3DModel | WanVACETransformer3DModel


@dataclass(frozen=True, slots=True)
class Time:
    """The embedded timestep: one vector for the head, six per block."""

    head_BD: torch.Tensor
    blocks_B6D: torch.Tensor


class WanAdapter:
    """A `WanTransformer3DModel`, cut open.

    An image (I2V) enters here: more channels beside the latents in `embed`, image tokens before the text in
    `text`.

    Args:
        weights: where those of the blocks are, by default whole on the device.
        dtype: what it computes in, by default what its weights are kept in.

    Source: `diffusers.models.transformers.transformer_wan.WanTransformer3DModel.forward`.
    """

    def __init__(self, model: Transformer, weights: Weights | None = None, dtype: torch.dtype | None = None):
        self._model, self._weights = model, weights or WholeWeights()
        self._patch: tuple[int, int, int] = tuple(model.config.patch_size)
        self.dtype: torch.dtype = dtype or model.dtype  # a walk over all modules: once, not at every step

    def geometry(self, latents_BCFHW: torch.Tensor) -> Geometry:
        """Token grid and rotary table of latents of this shape."""
        frames, height, width = (
            size // patch for size, patch in zip(latents_BCFHW.shape[2:], self._patch, strict=True)
        )
        return Geometry(Grid(frames, height, width), self._model.rope(latents_BCFHW))

    def text(self, embeddings_BTE: torch.Tensor, image_BIE: torch.Tensor | None = None) -> torch.Tensor:
        """Text encoder output, and that of an image encoder → `[B, T, D]`, what the blocks attend to."""
        embedder = self._model.condition_embedder
        text_BTD: torch.Tensor = embedder.text_embedder(embeddings_BTE)
        if image_BIE is None:
            return text_BTD
        return torch.concat([embedder.image_embedder(image_BIE), text_BTD], dim=1)

    def time(self, timestep_B: torch.Tensor, guidance: float | None = None) -> Time:
        """Embed the timestep, 0 … 1000, of each batch entry. Guidance is embedded in no Wan."""
        embedder = self._model.condition_embedder
        projected = embedder.timesteps_proj(timestep_B)
        weight_dtype = next(iter(embedder.time_embedder.parameters())).dtype
        if weight_dtype != torch.int8:
            projected = projected.to(weight_dtype)
        head_BD = embedder.time_embedder(projected).to(self.dtype)
        blocks = embedder.time_proj(embedder.act_fn(head_BD))
        return Time(head_BD, blocks.unflatten(1, (6, -1)))

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Latents, and what they are conditioned on, both in the transformer's dtype → tokens."""
        if condition_BCFHW is not None:
            latents_BCFHW = torch.cat([latents_BCFHW, condition_BCFHW], dim=1)
        return (_tokens(self._model.patch_embedding, latents_BCFHW),)

    def blocks(self, tokens: Tokens, text_BTD: torch.Tensor, time: Time, rotary: Rotary) -> torch.Tensor:
        """Run every transformer block: tokens → feature `[B, L, D]`; `rotary` holds these tokens' rows."""
        return self.branches(tokens, [text_BTD], time, rotary)[0]

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        """As `blocks` for several texts: all of them pass a block before the next one, whose weights may have
        to be collected, is run."""
        (tokens_BLD,) = tokens
        features_BLD = [tokens_BLD] * len(texts_BTD)
        for block in self._weights.visit(self._model.blocks):
            for branch, text_BTD in enumerate(texts_BTD):
                features_BLD[branch] = block(features_BLD[branch], text_BTD, time.blocks_B6D, rotary)
        return features_BLD

    def project(self, feature_BLD: torch.Tensor, time: Time) -> torch.Tensor:
        """Feature → patches `[B, L, patch · C]`: norm, modulate by the timestep, project, token by token."""
        shift, scale = (self._model.scale_shift_table + time.head_BD.unsqueeze(1)).chunk(2, dim=1)
        normed = (self._model.norm_out(feature_BLD.float()) * (1 + scale) + shift).type_as(feature_BLD)
        patches_BLP: torch.Tensor = self._model.proj_out(normed)
        return patches_BLP

    def unpatchify(self, patches_BLP: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Projected tokens `[B, L, patch · C]` → velocity `[B, C, F, H, W]`."""
        p_f, p_h, p_w = self._patch
        blocks = patches_BLP.reshape(
            patches_BLP.shape[0], grid.frames, grid.height, grid.width, p_f, p_h, p_w, -1
        )
        return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class VaceAdapter(WanAdapter):
    """A `WanVACETransformer3DModel`: beside the blocks runs a path of fewer blocks over what is known of the
    video, and adds to theirs.

    A block of that path runs just after the block that it adds to, so one addend is held at a time, not all.

    Source: `diffusers.models.transformers.transformer_wan_vace.WanVACETransformer3DModel.forward`.
    """

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Latents, and what is known of the video (96 channels in Wan2.1) → tokens of both.

        Raises:
            ValueError: nothing is said of what is known.
        """
        if condition_BCFHW is None:
            raise ValueError("VACE is conditioned on what is known of a video, if it is nothing")
        return (*super().embed(latents_BCFHW), _tokens(self._model.vace_patch_embedding, condition_BCFHW))

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        embedded_BLD, control_BLD = tokens
        features_BLD = [embedded_BLD] * len(texts_BTD)
        controls_BLD = [control_BLD] * len(texts_BTD)
        path = set(self._model.vace_blocks)
        for block in self._weights.visit(self._in_order()):
            for branch, text_BTD in enumerate(texts_BTD):
                if block in path:
                    hint_BLD, controls_BLD[branch] = block(
                        embedded_BLD, text_BTD, controls_BLD[branch], time.blocks_B6D, rotary
                    )
                    features_BLD[branch] = features_BLD[branch] + hint_BLD
                else:
                    features_BLD[branch] = block(features_BLD[branch], text_BTD, time.blocks_B6D, rotary)
        return features_BLD

    def _in_order(self) -> list[nn.Module]:
        """The blocks as they run: one of the path after each that it adds to."""
        path = iter(self._model.vace_blocks)
        order: list[nn.Module] = []
        for layer, block in enumerate(self._model.blocks):
            order += [block, next(path)] if layer in self._model.config.vace_layers else [block]
        return order


def open_adapter(
    model: Transformer, weights: Weights | None = None, dtype: torch.dtype | None = None
) -> WanAdapter:
    """The adapter of a model's class."""
    kind = VaceAdapter if isinstance(model, WanVACETransformer3DModel) else WanAdapter
    return kind(model, weights, dtype)


def every_block(model: Transformer) -> list[nn.Module]:
    """All that have a self-attention, those of VACE's own path included."""
    return [*model.blocks, *getattr(model, "vace_blocks", ())]


def _tokens(embedding: nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
    tokens_BLD: torch.Tensor = embedding(latents_BCFHW).flatten(2).transpose(1, 2)
    return tokens_BLD.contiguous()
