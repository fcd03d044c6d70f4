"""Wan's models on disk: their kinds, and whether a folder holds a complete one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtime.files.text import read_json
from runtime.models.settings import empty_model
from runtime.models.wan.experts import expert_settings, read_transformer, read_transformers
from runtime.models.wan.settings import (
    ImageEncoderSettings,
    TextEncoderSettings,
    TransformerSettings,
    VaeSettings,
    WanIndex,
)
from runtime.models.weight_files import DIFFUSERS_STEM, WeightFiles
from runtime.request.config import Architecture


class ModelKind(StrEnum):
    """Kind of a Wan model by its input: text, an image, or VACE; the value is its pipeline in diffusers."""

    TEXT = "WanPipeline"
    IMAGE = "WanImageToVideoPipeline"
    VACE = "WanVACEPipeline"

    @property
    def transformer(self) -> str:
        """Class of its transformer in diffusers."""
        return "WanVACETransformer3DModel" if self is ModelKind.VACE else "WanTransformer3DModel"


def knows_frames(path: Path) -> bool:
    """Return whether the model in `path` can begin with frames that are known, with or without an image.

    That of TI2V-5B can, whose tokens have a timestep each. Its repository names the pipeline for text, but
    diffusers has two for it: `WanPipeline`, and with an image `WanImageToVideoPipeline`.
    """
    index = WanIndex.read(path / "model_index.json")
    return bool(index.expand_timesteps) and index.pipeline != ModelKind.VACE


def check_folder(path: Path, kind: ModelKind, expected: Architecture | None) -> None:
    """Check that a folder's settings are valid and fit each other, and that its weights match them.

    Args:
        path: the folder.
        kind: kind of the model.
        expected: shape that its transformers should have; None for any.

    Raises:
        OSError, ValueError, SafetensorError: they are not; the message says what is wrong.
    """
    read_json(path / "scheduler" / "scheduler_config.json")
    expert_settings(path)
    tokenizer = path / "tokenizer"
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise FileNotFoundError(f"{tokenizer}: holds neither tokenizer.json nor spiece.model")
    transformer = read_transformer(path)
    _check_conditioning(kind, transformer, by_token=knows_frames(path))
    if expected is not None and transformer.architecture != expected:
        raise ValueError(f"its transformer has {transformer.architecture}, but the config expects {expected}")
    vae = VaeSettings.read(path / "vae" / "config.json")
    text = TextEncoderSettings.read(path / "text_encoder" / "config.json")
    if vae.z_dim != transformer.channels:
        raise ValueError(f"its VAE has {vae.z_dim} channels, its transformer predicts {transformer.channels}")
    if text.d_model != transformer.text_dim:
        raise ValueError(
            f"its text encoder gives {text.d_model} channels, its transformer takes {transformer.text_dim}"
        )
    _check_weights(path, kind)
    if transformer.sees_image_tokens:
        _check_image_encoder(path)


def _check_weights(path: Path, kind: ModelKind) -> None:
    """Check the headers of weight files against the models that the settings describe."""
    transformers = dict.fromkeys(WanIndex.read(path / "model_index.json").folders, kind.transformer)
    for component, model in (transformers | {"vae": "AutoencoderKLWan"}).items():
        folder = path / component
        WeightFiles(folder, DIFFUSERS_STEM).check(_shapes(folder, model))
    folder = path / "text_encoder"
    WeightFiles(folder, "model").check(_shapes(folder, "UMT5EncoderModel"), complete=False)  # some are tied


def _check_image_encoder(path: Path) -> None:
    """Check the image encoder, and what prepares images for it."""
    read_json(path / "image_processor" / "preprocessor_config.json")
    folder = path / "image_encoder"
    ImageEncoderSettings.read(folder / "config.json")
    wanted = _shapes(folder, "CLIPVisionModel")
    WeightFiles(folder, "model").check(wanted, prefix="vision_model.", complete=False)


def transformer_shapes(path: Path, kind: ModelKind) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a transformer's weights, from its settings; those of two experts are the same."""
    return _shapes(path / next(iter(read_transformers(path))), kind.transformer)


def _shapes(folder: Path, model: str) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a component's weights, from its settings."""
    settings = folder / "config.json"
    return _shapes_of(model, json.dumps(read_json(settings)), settings)


@lru_cache(maxsize=16)
def _shapes_of(model: str, content: str, settings: Path) -> Mapping[str, tuple[int, ...]]:
    """Building a model takes longer than all other checks, and a process may load from the settings again."""
    given = json.loads(content)
    return MappingProxyType(empty_model(lambda: _built(model, given), settings))


def _built(model: str, settings: dict[str, Any]) -> Any:
    """A model of transformers or diffusers, by the name of its class."""
    import diffusers  # here because these take seconds
    import transformers

    if config := _CONFIGS.get(model):
        return getattr(transformers, model)(getattr(transformers, config).from_dict(settings))
    return getattr(diffusers, model).from_config(settings)


_CONFIGS = {"UMT5EncoderModel": "UMT5Config", "CLIPVisionModel": "CLIPVisionConfig"}  # of transformers


def _check_conditioning(kind: ModelKind, transformer: TransformerSettings, *, by_token: bool) -> None:
    """Refuse a transformer whose conditioning is not that of its pipeline.

    An image enters as latents beside the noisy ones, and in Wan2.1 as tokens of an image encoder, too; with a
    timestep for each token, in the place of noisy ones.
    """
    has_image = transformer.sees_image_tokens
    extra = transformer.in_channels - transformer.channels
    has_control = transformer.vace_layers is not None
    named = transformer.class_name or kind.transformer
    if has_control != (kind is ModelKind.VACE) or named != kind.transformer:
        raise ValueError(f"it is a {kind}, but its transformer is a {named}")
    if by_token and transformer.patch_size[0] > 1:
        raise ValueError(
            "its tokens have a timestep each (expand_timesteps), but are of several latent frames"
        )
    if (kind is not ModelKind.IMAGE or by_token) and (has_image or extra):
        raise ValueError(f"its transformer expects an image beside its latents, which a {kind} does not take")
    if kind is ModelKind.IMAGE and not by_token and not extra:
        raise ValueError("its image conditioning is not that of Wan2.1's or Wan2.2's I2V, and not supported")
