"""CLIP's image encoder of Wan2.1's I2V, in other layouts: under OpenCLIP's names, or under transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.models.layouts.plain import plain, prefix_of
from runtime.models.layouts.stored import Stored
from runtime.models.layouts.weights import Component, Shapes, Weight, check_names

_OWN_PREFIXES = ("visual.", "", "clip_vision.visual.", "clip_vision.")
_OWN, _TRANSFORMERS = (
    "transformer.0.attn.to_qkv.weight",
    "vision_model.encoder.layers.0.self_attn.q_proj.weight",
)
_HEAD_DIM = 80  # of ViT-H
_PREFIX = "vision_model."
_OUTER = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}
_EMBEDDED = {  # OpenCLIP's name → transformers', and axes without that of images
    "cls_embedding": ("embeddings.class_embedding", 1),
    "pos_embedding": ("embeddings.position_embedding.weight", 2),
}
_INNER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_UNUSED = "head"  # projects into the space of texts, which Wan does not use


def find_image_encoder(tensors: Mapping[str, Stored]) -> Component | None:
    """Find CLIP's image encoder among the tensors of a file; a text encoder beside it is left out.

    Returns:
        The encoder, named `image_encoder`; None if there is none.

    Raises:
        ValueError: it has weights that CLIP does not have, or lacks some.
    """
    prefix = prefix_of(tensors, _OWN_PREFIXES, _OWN)
    if prefix is not None:
        weights = _from_own(plain(tensors, prefix), prefix)
    elif _TRANSFORMERS in tensors:
        used = {key: one for key, one in tensors.items() if not key.endswith(".position_ids")}
        weights = {_PREFIX + name: one for name, one in plain(used, _PREFIX).items()}
    else:
        return None
    settings = _settings(weights)
    check_names("image encoder", weights, _expected(settings["num_hidden_layers"]))
    return Component("image_encoder", settings, weights)


def _expected(layers: int) -> list[str]:
    modules = [*_INNER.values(), *(f"self_attn.{one}_proj" for one in "qkv")]
    inner = [
        f"encoder.layers.{number}.{module}.{leaf}"
        for number in range(layers)
        for module in modules
        for leaf in ("weight", "bias")
    ]
    return [_PREFIX + name for name in (*_OUTER.values(), *(one for one, _ in _EMBEDDED.values()), *inner)]


def _from_own(own: Mapping[str, Weight], prefix: str) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for key, weight in own.items():
        if key == _UNUSED:
            continue
        made = _renamed(key, weight)
        if not made:
            raise ValueError(f"its image encoder has a weight that CLIP does not have: {prefix}{key}")
        weights |= {_PREFIX + name: one for name, one in made}
    return weights


def _renamed(key: str, weight: Weight) -> list[tuple[str, Weight]]:
    """Weights of transformers that are made from one of OpenCLIP's; empty if there are none."""
    if key in _EMBEDDED:
        name, axes = _EMBEDDED[key]
        alone = set(weight.shape[:-axes]) <= {1}  # not of several images
        return [(name, weight._replace(shape=weight.shape[-axes:]))] if alone else []
    if key in _OUTER:
        return [(_OUTER[key], weight)]
    stack, _, rest = key.partition(".")
    return _in_layer(rest, weight) if stack == "transformer" else []


def _in_layer(key: str, weight: Weight) -> list[tuple[str, Weight]]:
    """As `_renamed`, within the stack of layers."""
    number, _, rest = key.partition(".")
    module, _, leaf = rest.rpartition(".")
    layer = f"encoder.layers.{number}"
    if module in _INNER:
        return [(f"{layer}.{_INNER[module]}.{leaf}", weight)]
    if module != "attn.to_qkv" or not weight.shape:
        return []
    width = weight.shape[0] // 3
    return [
        (
            f"{layer}.self_attn.{one}_proj.{leaf}",
            weight._replace(shape=(width, *weight.shape[1:]), rows=(at * width, (at + 1) * width)),
        )
        for at, one in enumerate("qkv")
    ]


def _settings(weights: Mapping[str, Weight]) -> dict[str, Any]:
    shapes = Shapes("image encoder", weights)
    width, _colours, patch, _ = shapes.of(f"{_PREFIX}embeddings.patch_embedding.weight", 4)
    places = shapes.of(f"{_PREFIX}embeddings.position_embedding.weight", 2)[0] - 1
    if width % _HEAD_DIM:
        raise ValueError(
            f"its image encoder has {width} channels, from which its number of heads does not follow"
        )
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes.of(f"{_PREFIX}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shapes.count(f"{_PREFIX}encoder.layers"),
        "num_attention_heads": width // _HEAD_DIM,
        "image_size": patch * round(places**0.5),
        "patch_size": patch,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 1024,
    }
