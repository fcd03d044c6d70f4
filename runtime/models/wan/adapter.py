"""Wan's transformer in three pieces, embed → blocks → head, that together equal its own forward bit for bit.

A step can be cut between the pieces: a forecast step runs only the head (`project` and `unpatchify`), and
ranks split the tokens between `embed` and `unpatchify`. What does not change during a generation (text
embedding, rotary table) is computed once.

Tensor legend: B batch, L tokens, S those of this rank, D channels of the transformer, C latent channels, F
latent frames, H, W latent height and width, T text tokens.
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

_ROWS = 64  # as many as a matrix has that is not multiplied as a vector


@dataclass(frozen=True, slots=True)
class Time:
    """Embedded timestep: one vector for the head, six for the blocks; of all tokens at once, or of each.

    Attributes:
        head_BSD: S is 1 if all tokens have one timestep.
        blocks: `[B, 6, D]` in that case, otherwise `[B, S, 6, D]`.
    """

    head_BSD: torch.Tensor
    blocks: torch.Tensor


class WanAdapter:
    """A `WanTransformer3DModel` in three pieces; see `runtime.models.base.Adapter`.

    An image (I2V) enters as additional channels beside the latents in `embed`, and as image tokens before
    the text in `text`; TI2V's is in `FramesAdapter`.

    Args:
        model: the transformer.
        weights: where the blocks' weights are, by default whole on the device.
        dtype: compute dtype, by default the dtype that its weights are stored in.

    Source: `diffusers.models.transformers.transformer_wan.WanTransformer3DModel.forward`.
    """

    def __init__(self, model: Transformer, weights: Weights | None = None, dtype: torch.dtype | None = None):
        self._model, self._weights = model, weights or WholeWeights()
        self._patch: tuple[int, int, int] = tuple(model.config.patch_size)
        self.dtype: torch.dtype = dtype or model.dtype  # visits all modules: once, not at every step

    def geometry(self, latents_BCFHW: torch.Tensor) -> Geometry:
        """Token grid and rotary table of latents of this shape."""
        frames, height, width = (
            size // patch for size, patch in zip(latents_BCFHW.shape[2:], self._patch, strict=True)
        )
        return Geometry(Grid(frames, height, width), self._model.rope(latents_BCFHW))

    def text(self, embeddings_BTE: torch.Tensor, image_BIE: torch.Tensor | None = None) -> torch.Tensor:
        """Project the text and image encoders' outputs to `[B, T, D]`, for cross-attention."""
        embedder = self._model.condition_embedder
        text_BTD: torch.Tensor = embedder.text_embedder(embeddings_BTE)
        if image_BIE is None:
            return text_BTD
        return torch.concat([embedder.image_embedder(image_BIE), text_BTD], dim=1)

    def time(
        self,
        timestep_B: torch.Tensor,
        guidance: float | None = None,
        known_1S1: torch.Tensor | None = None,
    ) -> Time:
        """Embed the timestep, 0 … 1000, of each batch entry. No Wan model embeds guidance.

        Raises:
            ValueError: some tokens have another timestep.
        """
        if known_1S1 is not None:
            raise ValueError("this transformer has one timestep for all tokens")
        return self._embedded(timestep_B)

    def _embedded(self, timestep_B: torch.Tensor) -> Time:
        embedder = self._model.condition_embedder
        projected = embedder.timesteps_proj(timestep_B)
        weight_dtype = next(iter(embedder.time_embedder.parameters())).dtype
        if weight_dtype != torch.int8:
            projected = projected.to(weight_dtype)
        head_BD = embedder.time_embedder(projected).to(self.dtype)
        blocks = embedder.time_proj(embedder.act_fn(head_BD))
        return Time(head_BD.unsqueeze(1), blocks.unflatten(1, (6, -1)))

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Embed latents and their conditioning, both in the transformer's dtype, as tokens."""
        if condition_BCFHW is not None:
            latents_BCFHW = torch.cat([latents_BCFHW, condition_BCFHW], dim=1)
        return (_tokens(self._model.patch_embedding, latents_BCFHW),)

    def expect(self) -> None:
        """Begin to bring the blocks' weights to the device, if they are elsewhere: the blocks run next."""
        self._weights.expect(every_block(self._model))

    def blocks(self, tokens: Tokens, text_BTD: torch.Tensor, time: Time, rotary: Rotary) -> torch.Tensor:
        """Run every transformer block for one text; return the feature `[B, L, D]`. See `branches`."""
        return self.branches(tokens, [text_BTD], time, rotary)[0]

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        """Run every transformer block for several texts; return one feature `[B, L, D]` for each text.

        All texts pass a block before the next one runs, so that sharded weights are gathered once.

        Args:
            tokens: this rank's tokens.
            texts_BTD: one text for each branch, from `text`.
            time: embedded timestep, from `time`.
            rotary: rows of the rotary table for these tokens.
        """
        (tokens_BLD,) = tokens
        features_BLD = [tokens_BLD] * len(texts_BTD)
        for block in self._weights.visit(self._model.blocks):
            for branch, text_BTD in enumerate(texts_BTD):
                features_BLD[branch] = block(features_BLD[branch], text_BTD, time.blocks, rotary)
        return features_BLD

    def project(self, feature_BLD: torch.Tensor, time: Time) -> torch.Tensor:
        """Project a feature to patches `[B, L, patch · C]`: norm, modulation by the timestep, projection."""
        table_112D = self._model.scale_shift_table.unsqueeze(0)
        shift, scale = (one.squeeze(2) for one in (table_112D + time.head_BSD.unsqueeze(2)).chunk(2, dim=2))
        normed = (self._model.norm_out(feature_BLD.float()) * (1 + scale) + shift).type_as(feature_BLD)
        patches_BLP: torch.Tensor = self._model.proj_out(normed)
        return patches_BLP

    def unpatchify(self, patches_BLP: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Rearrange patches `[B, L, patch · C]` of all tokens to a velocity `[B, C, F, H, W]`."""
        p_f, p_h, p_w = self._patch
        blocks = patches_BLP.reshape(
            patches_BLP.shape[0], grid.frames, grid.height, grid.width, p_f, p_h, p_w, -1
        )
        return blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class FramesAdapter(WanAdapter):
    """A transformer with a timestep for each token (TI2V-5B): known frames take the place of noisy ones.

    diffusers embeds the timestep of every token. Here each value is embedded once, as a matrix of equal rows:
    a single row would be multiplied by another kernel, and be rounded otherwise.

    Source: `diffusers.WanPipeline` and `WanImageToVideoPipeline` with `expand_timesteps`.
    """

    def time(
        self,
        timestep_B: torch.Tensor,
        guidance: float | None = None,
        known_1S1: torch.Tensor | None = None,
    ) -> Time:
        """Embed the timestep, 0 … 1000, of each batch entry, and 0 for tokens of known frames."""
        noisy = self._embedded_in_rows(timestep_B)
        if known_1S1 is None:
            return noisy
        clean = self._embedded_in_rows(torch.zeros_like(timestep_B))
        blocks = torch.where(known_1S1.unsqueeze(-1), clean.blocks.unsqueeze(1), noisy.blocks.unsqueeze(1))
        return Time(torch.where(known_1S1, clean.head_BSD, noisy.head_BSD), blocks)

    def _embedded_in_rows(self, timestep_B: torch.Tensor) -> Time:
        rows = self._embedded(timestep_B.repeat_interleave(_ROWS))
        return Time(rows.head_BSD[::_ROWS], rows.blocks[::_ROWS])

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Embed latents, the first of which are replaced by those of known frames, as tokens."""
        if condition_BCFHW is not None:
            later_BCFHW = latents_BCFHW[:, :, condition_BCFHW.shape[2] :]
            latents_BCFHW = torch.cat([condition_BCFHW.to(later_BCFHW.dtype), later_BCFHW], dim=2)
        return super().embed(latents_BCFHW)


class VaceAdapter(WanAdapter):
    """A `WanVACETransformer3DModel`: a second path of fewer blocks runs over the control latents, and its
    outputs are added to those of the blocks.

    A control block runs just after the block whose output it adds to, so only one hint is held at a time.

    Source: `diffusers.models.transformers.transformer_wan_vace.WanVACETransformer3DModel.forward`.
    """

    def embed(self, latents_BCFHW: torch.Tensor, condition_BCFHW: torch.Tensor | None = None) -> Tokens:
        """Embed latents and control latents (96 channels in Wan2.1) as tokens.

        Raises:
            ValueError: there are no control latents.
        """
        if condition_BCFHW is None:
            raise ValueError("VACE needs control latents, even if nothing of the video is known")
        return (*super().embed(latents_BCFHW), _tokens(self._model.vace_patch_embedding, condition_BCFHW))

    def branches(
        self, tokens: Tokens, texts_BTD: Sequence[torch.Tensor], time: Time, rotary: Rotary
    ) -> list[torch.Tensor]:
        embedded_BLD, control_BLD = tokens
        features_BLD = [embedded_BLD] * len(texts_BTD)
        controls_BLD = [control_BLD] * len(texts_BTD)
        path = set(self._model.vace_blocks)
        for block in self._weights.visit(every_block(self._model)):
            for branch, text_BTD in enumerate(texts_BTD):
                if block in path:
                    hint_BLD, controls_BLD[branch] = block(
                        embedded_BLD, text_BTD, controls_BLD[branch], time.blocks, rotary
                    )
                    features_BLD[branch] = features_BLD[branch] + hint_BLD
                else:
                    features_BLD[branch] = block(features_BLD[branch], text_BTD, time.blocks, rotary)
        return features_BLD


def open_adapter(
    model: Transformer,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    *,
    by_token: bool = False,
) -> WanAdapter:
    """Make the adapter for a transformer; for the other arguments see `WanAdapter`.

    Args:
        by_token: whether its pipeline gives it a timestep for each token.
    """
    kind = VaceAdapter if isinstance(model, WanVACETransformer3DModel) else WanAdapter
    return (FramesAdapter if by_token else kind)(model, weights, dtype)


def every_block(model: Transformer) -> list[nn.Module]:
    """List all blocks that have self-attention, in the order in which they run.

    Each of VACE's control blocks follows the block to whose output it adds.
    """
    if not isinstance(model, WanVACETransformer3DModel):
        return [*model.blocks]
    path, order = iter(model.vace_blocks), []
    for layer, block in enumerate(model.blocks):
        order += [block, next(path)] if layer in model.config.vace_layers else [block]
    return order


def _tokens(embedding: nn.Module, latents_BCFHW: torch.Tensor) -> torch.Tensor:
    tokens_BLD: torch.Tensor = embedding(latents_BCFHW).flatten(2).transpose(1, 2)
    return tokens_BLD.contiguous()
