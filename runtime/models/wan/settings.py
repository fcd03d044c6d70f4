"""Settings of Wan's components, read from a model folder's JSON files and checked by type."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from runtime.models.settings import ModelIndex, Settings
from runtime.request.config import Architecture

_Count = Annotated[int, Field(ge=1)]


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even")
    return value


class WanIndex(ModelIndex):
    """Contents of Wan's `model_index.json`: its transformers, where the second takes over, and whether each
    token has a timestep of its own, so that frames can be known (TI2V-5B).

    Source: `diffusers.WanPipeline`, which takes either transformer as missing.
    """

    transformer: list[str | None] = Field(["diffusers", ""])  # settings alone may not name it
    transformer_2: list[str | None] | None = None
    boundary_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    expand_timesteps: bool | None = False

    @model_validator(mode="after")
    def _has_a_transformer_for_each_step(self) -> Self:
        if self.boundary_ratio is None and any(self.transformer_2 or ()):
            raise ValueError("transformer_2 is named, but boundary_ratio does not say where it takes over")
        if not self.folders:
            raise ValueError("neither transformer nor transformer_2 is named")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders of its transformers, in the order of their steps; a missing one is left out."""
        named = {"transformer": self.transformer, "transformer_2": self.transformer_2 or ()}
        return tuple(name for name, kind in named.items() if any(one is not None for one in kind))


class SchedulerSettings(Settings):
    """Contents of Wan's `scheduler/scheduler_config.json` that its transformers depend on."""

    num_train_timesteps: _Count = 1000


class TransformerSettings(Settings):
    """Contents of Wan's `transformer/config.json`."""

    class_name: str | None = Field(None, alias="_class_name")
    patch_size: list[_Count] = Field([1, 2, 2], min_length=3, max_length=3)
    num_attention_heads: _Count = 40
    attention_head_dim: Annotated[_Count, AfterValidator(_even)] = 128
    in_channels: _Count = 16
    out_channels: _Count | None = 16
    text_dim: _Count = 4096
    freq_dim: Annotated[_Count, AfterValidator(_even)] = 256
    ffn_dim: _Count = 13824
    num_layers: _Count = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    image_dim: _Count | None = None
    added_kv_proj_dim: _Count | None = None
    rope_max_seq_len: _Count = 1024
    pos_embed_seq_len: _Count | None = None
    vace_layers: list[Annotated[int, Field(ge=0)]] | None = None
    vace_in_channels: _Count | None = None

    @property
    def channels(self) -> int:
        """Channels of its output; by default those of its input."""
        return self.out_channels or self.in_channels

    @property
    def sees_image_tokens(self) -> bool:
        """True for Wan2.1's I2V, whose blocks attend to the output of an image encoder."""
        return self.image_dim is not None

    @property
    def architecture(self) -> Architecture:
        """Shape of the transformer."""
        return Architecture(
            layers=self.num_layers,
            heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            ffn_dim=self.ffn_dim,
        )


class VaeSettings(Settings):
    """Contents of Wan's `vae/config.json`. The VAEs of the Wan2.1 repositories state no scale factors."""

    class_name: str | None = Field(None, alias="_class_name")
    base_dim: _Count = 96
    decoder_base_dim: _Count | None = None
    z_dim: _Count = 16
    dim_mult: list[_Count] = Field([1, 2, 4, 4], min_length=1)
    num_res_blocks: _Count = 2
    attn_scales: list[float] = Field([])
    temperal_downsample: list[bool] = Field([False, True, True])
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    latents_mean: list[Annotated[float, Field(allow_inf_nan=False)]] | None = None
    latents_std: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    is_residual: bool = False
    in_channels: _Count = 3
    out_channels: _Count = 3
    patch_size: _Count | None = None
    scale_factor_temporal: _Count = 4
    scale_factor_spatial: _Count = 8

    @model_validator(mode="after")
    def _one_number_for_each_channel(self) -> Self:
        for name in ("latents_mean", "latents_std"):
            given = getattr(self, name)
            numbers = 16 if given is None else len(given)  # diffusers' defaults are Wan2.1's
            if numbers != self.z_dim:
                raise ValueError(f"{name} has {numbers} numbers where z_dim is {self.z_dim}")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample needs one value fewer than dim_mult")
        return self


class TextEncoderSettings(Settings):
    """Contents of UMT5's `text_encoder/config.json`."""

    model_type: str = "umt5"
    vocab_size: _Count
    d_model: _Count
    d_kv: _Count
    d_ff: _Count
    num_layers: _Count
    num_heads: _Count

    @model_validator(mode="after")
    def _is_umt5(self) -> Self:
        if self.model_type != "umt5":
            raise ValueError(f"model_type {self.model_type!r} is not umt5, Wan's text encoder")
        return self


class ImageEncoderSettings(Settings):
    """Contents of CLIP's `image_encoder/config.json`."""

    hidden_size: _Count = 768
    intermediate_size: _Count = 3072
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 12
    image_size: _Count = 224
    patch_size: _Count = 32
