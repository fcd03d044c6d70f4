"""Settings of a model that no weight file states: its pipeline, its sampler, and its image processor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.models.wan.folder import ModelKind

_BOUNDARIES = {ModelKind.TEXT: 0.875, ModelKind.IMAGE: 0.9, ModelKind.VACE: 0.875}  # of Wan2.2's two experts
_SHIFT, _SHIFT_OF_LAST_FRAME, _SHIFT_OF_5B = 3.0, 16.0, 5.0  # as in Wan's repositories in diffusers layout
_CLASSES = {
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
_IMAGE_CLASSES = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}
_NONE = (None, None)


def other_settings(components: Mapping[str, Mapping[str, Any]]) -> dict[str, object]:
    """Make the JSON files beside the components' own.

    Args:
        components: name → settings, of every component with weights.

    Raises:
        ValueError: the transformer's channels are those of no pipeline.
    """
    transformer, vae = components["transformer"], components["vae"]
    kind = _kind(transformer)
    image = components.get("image_encoder")
    settings: dict[str, object] = {
        "model_index.json": _index(kind, components),
        "scheduler/scheduler_config.json": _scheduler(transformer, vae),
    }
    if image is not None:
        settings["image_processor/preprocessor_config.json"] = _processor(image["image_size"])
    return settings


def _kind(transformer: Mapping[str, Any]) -> ModelKind:
    if transformer.get("vace_layers") is not None:
        return ModelKind.VACE
    taken, made = transformer["in_channels"], transformer["out_channels"]
    if taken == made:
        return ModelKind.TEXT
    if taken == 2 * made + 4:  # the latents, those of the image, and a mask of four frames
        return ModelKind.IMAGE
    raise ValueError(
        f"its transformer takes {taken} channels and makes {made}; Wan's text to video takes as many as it "
        f"makes, image to video {2 * made + 4}"
    )


def _index(kind: ModelKind, components: Mapping[str, Mapping[str, Any]]) -> dict[str, object]:
    transformer = ("diffusers", kind.transformer)
    second = "transformer_2" in components
    index: dict[str, object] = {"_class_name": kind.value} | {
        name: list(one) for name, one in _CLASSES.items()
    }
    index["transformer"] = list(transformer)
    index["transformer_2"] = list(transformer if second else _NONE)
    index["boundary_ratio"] = _BOUNDARIES[kind] if second else None
    if kind is ModelKind.IMAGE:
        held = "image_encoder" in components
        index |= {name: list(one if held else _NONE) for name, one in _IMAGE_CLASSES.items()}
    if kind is not ModelKind.VACE:
        index["expand_timesteps"] = bool(components["vae"].get("is_residual"))
    return index


def _scheduler(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, object]:
    shift = _SHIFT
    if transformer.get("pos_embed_seq_len") is not None:
        shift = _SHIFT_OF_LAST_FRAME
    elif vae.get("is_residual"):
        shift = _SHIFT_OF_5B
    return {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }


def _processor(size: int) -> dict[str, object]:
    """Make the settings of CLIP's image processor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
