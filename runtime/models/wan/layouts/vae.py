"""Wan's VAEs under the names of Wan's own code: that of Wan2.1, and the residual one of Wan2.2's TI2V-5B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from runtime.models.layouts.plain import plain, prefix_of
from runtime.models.layouts.stored import Stored
from runtime.models.layouts.weights import Component, Shapes, Weight

_PREFIXES = ("", "vae.", "first_stage_model.", "model.")
_OWN, _DIFFUSERS = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"
_RESIDUAL = "encoder.downsamples.0.downsamples.0.residual.0.gamma"
_UNIT = {  # parts of a residual block
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_FIXED = {"conv1": "quant_conv", "conv2": "post_quant_conv"}  # modules outside the stages
for _side in ("encoder", "decoder"):
    _middle, _block = f"{_side}.middle", f"{_side}.mid_block"
    _FIXED |= {f"{_side}.{own}": f"{_side}.{name}" for own, name in _ENDS.items()}
    _FIXED |= {f"{_middle}.1.{name}": f"{_block}.attentions.0.{name}" for name in ("norm", "to_qkv", "proj")}
    for _own, _name in _UNIT.items():
        _FIXED |= {f"{_middle}.0.{_own}": f"{_block}.resnets.0.{_name}"}
        _FIXED |= {f"{_middle}.2.{_own}": f"{_block}.resnets.1.{_name}"}
_STAGE = re.compile(r"(?P<side>encoder|decoder)\.(down|up)samples\.(?P<number>\d+)\.(?P<inner>.+)")
_LAYER = re.compile(r"(down|up)samples\.(?P<number>\d+)\.(?P<unit>.+)")
# Mean and standard deviation of the latents, which no file holds: facts about the two published VAEs. Those
# of 16 channels are diffusers' defaults.
MEAN_48 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD_48 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


def find_vae(tensors: Mapping[str, Stored]) -> Component | None:
    """Find a VAE of Wan among the tensors of a file.

    Returns:
        The VAE, named `vae`; None if there is none.

    Raises:
        ValueError: it has weights or a number of channels that neither of Wan's VAEs has.
    """
    prefix = prefix_of(tensors, _PREFIXES, _OWN)
    if prefix is None:
        if prefix_of(tensors, _PREFIXES, _DIFFUSERS) is None:
            return None
        raise ValueError(
            "its VAE has diffusers' names, and its settings are not known; use the file under Wan's own names"
        )
    own = plain(tensors, prefix)
    residual = _RESIDUAL in own
    places = {} if residual else _places(own)
    weights = {}
    for key, weight in own.items():
        module, _, leaf = key.rpartition(".")
        name = _renamed(module, places, residual=residual)
        if name is None:
            raise ValueError(f"its VAE has a weight that Wan's VAEs do not have: {prefix}{key}")
        weights[f"{name}.{leaf}"] = weight
    return Component("vae", _settings(Shapes("VAE", weights), residual=residual), weights)


def _renamed(module: str, places: Mapping[str, str], *, residual: bool) -> str | None:
    """Name in diffusers of a module of Wan's own code; None if there is none.

    Args:
        module: Wan's name.
        places: number of a layer of Wan2.1's decoder → its place in diffusers.
        residual: whether it is the VAE of Wan2.2.
    """
    if module in _FIXED:
        return _FIXED[module]
    stage = _STAGE.fullmatch(module)
    if stage is None:
        return None
    side, number, inner = stage["side"], stage["number"], stage["inner"]
    way = "down" if side == "encoder" else "up"
    if residual:
        return _in_residual(f"{side}.{way}_blocks.{number}", way, inner)
    place = number if side == "encoder" else places.get(number)
    return None if place is None else f"{side}.{way}_blocks.{place}.{_UNIT.get(inner, inner)}"


def _in_residual(block: str, way: str, inner: str) -> str | None:
    """Name of a module in a block of Wan2.2's VAE, whose layers are numbered within their block."""
    layer = _LAYER.fullmatch(inner)
    if layer is None:
        return None
    unit = layer["unit"]
    return (
        f"{block}.resnets.{layer['number']}.{_UNIT[unit]}"
        if unit in _UNIT
        else f"{block}.{way}sampler.{unit}"
    )


def _places(own: Mapping[str, Weight]) -> dict[str, str]:
    """Places of the layers of Wan2.1's decoder, which Wan counts through and diffusers block by block.

    Returns:
        Number of a layer → such as `1.resnets.0` or `1.upsamplers.0`.
    """
    kinds: dict[int, str] = {}
    for key in own:
        parts = key.split(".")
        if parts[:2] == ["decoder", "upsamples"] and len(parts) > 3 and parts[2].isdigit():
            inside = "resnets" if parts[3] in ("residual", "shortcut") else "upsamplers"
            kinds[int(parts[2])] = inside
    places, block, resnets = {}, 0, 0
    for number in sorted(kinds):
        if kinds[number] == "resnets":
            places[str(number)] = f"{block}.resnets.{resnets}"
            resnets += 1
        else:
            places[str(number)] = f"{block}.upsamplers.0"
            block, resnets = block + 1, 0
    return places


def _settings(shapes: Shapes, *, residual: bool) -> dict[str, Any]:
    """Infer the settings from shapes.

    Raises:
        ValueError: weights are missing, or the latents have a number of channels whose mean is not known.
    """
    base, channels, *_ = shapes.of("encoder.conv_in.weight", 5)
    latent = shapes.of("post_quant_conv.weight", 5)[0]
    widths, repeats, halved = (_residual_stages if residual else _flat_stages)(shapes)
    multiples = [width // base for width in widths]
    decoded = shapes.of("decoder.conv_in.weight", 5)[0] // max(multiples[-1], 1)
    settings: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": base,
        "decoder_base_dim": None if decoded == base else decoded,
        "z_dim": latent,
        "dim_mult": multiples,
        "num_res_blocks": repeats,
        "temperal_downsample": halved,
        "in_channels": channels,
        "out_channels": shapes.of("decoder.conv_out.weight", 5)[0],
        "is_residual": residual,
    }
    if latent == len(MEAN_48):
        settings |= {"latents_mean": list(MEAN_48), "latents_std": list(STD_48)}
    elif latent != 16:
        raise ValueError(
            f"its VAE has latents of {latent} channels; known are Wan2.1's of 16 and Wan2.2's of 48"
        )
    if residual:
        patch = {3: 1, 12: 2}.get(channels)
        if patch is None:
            raise ValueError(f"its VAE takes {channels} channels; Wan2.2's takes 12")
        settings |= {
            "patch_size": patch if patch > 1 else None,
            "scale_factor_spatial": patch * 2 ** (len(widths) - 1),
            "scale_factor_temporal": 2 ** sum(halved),
        }
    return settings


_Stages = tuple[list[int], int, list[bool]]  # width and number of residual blocks, and whether time is halved


def _flat_stages(shapes: Shapes) -> _Stages:
    """Stages of Wan2.1's encoder, whose layers are counted through; a sampler ends each but the last."""
    layers = [f"encoder.down_blocks.{number}" for number in range(shapes.count("encoder.down_blocks"))]
    ends = [number for number, layer in enumerate(layers) if f"{layer}.resample.1.weight" in shapes]
    bounds = [-1, *ends, len(layers)]
    repeats = {end - start - 1 for start, end in pairwise(bounds)}
    if len(repeats) != 1 or 0 in repeats:
        raise ValueError("its VAE has stages of different lengths, which Wan's VAEs do not have")
    widths = [shapes.of(f"{layers[end - 1]}.conv1.weight", 5)[0] for end in bounds[1:]]
    return widths, repeats.pop(), [f"{layers[end]}.time_conv.weight" in shapes for end in ends]


def _residual_stages(shapes: Shapes) -> _Stages:
    """Stages of Wan2.2's encoder, one a block."""
    blocks = [f"encoder.down_blocks.{number}" for number in range(shapes.count("encoder.down_blocks"))]
    widths = [shapes.of(f"{block}.resnets.0.conv1.weight", 5)[0] for block in blocks]
    repeats = shapes.count(f"{blocks[0]}.resnets")
    return widths, repeats, [f"{block}.downsampler.time_conv.weight" in shapes for block in blocks[:-1]]
