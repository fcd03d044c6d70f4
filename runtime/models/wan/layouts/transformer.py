"""Wan's transformer in other layouts: under the names of Wan's own code, or under those of diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runtime.models.layouts.plain import plain, prefix_of, rename_all
from runtime.models.layouts.stored import Stored
from runtime.models.layouts.weights import Component, Shapes, Weight

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.")
_OWN, _DIFFUSERS = "blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight"
_IMAGE = "condition_embedder.image_embedder"
_HEAD_DIM = 128  # of every published Wan
_OUTER = {  # modules outside the blocks: Wan's name → diffusers'
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": f"{_IMAGE}.norm1",
    "img_emb.proj.1": f"{_IMAGE}.ff.net.0.proj",
    "img_emb.proj.3": f"{_IMAGE}.ff.net.2",
    "img_emb.proj.4": f"{_IMAGE}.norm2",
    "head.head": "proj_out",
}
_LEAVES = {  # parameters without a module of their own
    "img_emb.emb_pos": f"{_IMAGE}.pos_embed",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
}  # fmt: skip
_INNER = {  # modules of a block
    **{f"self_attn.{own}": f"attn1.{name}" for own, name in _ATTENTION.items()},
    **{f"cross_attn.{own}": f"attn2.{name}" for own, name in _ATTENTION.items()},
    "norm3": "norm2",  # the only norm with weights; Wan counts attention, feed-forward, cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
}


def find_transformer(tensors: Mapping[str, Stored], stated: Mapping[str, Any]) -> Component | None:
    """Find a transformer of Wan among the tensors of a file.

    Args:
        tensors: the tensors.
        stated: settings in a `config.json` beside the file, Wan's own or diffusers'; empty without one.

    Returns:
        The transformer, named `transformer`; None if there is none.

    Raises:
        ValueError: it has weights that Wan2.1 and Wan2.2 do not have, or its shape is not clear.
    """
    own = prefix_of(tensors, _PREFIXES, _OWN)
    prefix = prefix_of(tensors, _PREFIXES, _DIFFUSERS) if own is None else own
    if prefix is None:
        return None
    weights = plain(tensors, prefix)
    if own is not None:
        known = "Wan's text to video, image to video and VACE do"
        weights = rename_all(weights, renamed, prefix, "transformer", known)
    return Component("transformer", _settings(weights, stated), weights)


def renamed(key: str) -> str | None:
    """Name in diffusers of one of Wan's own names; None if there is none."""
    if key in _LEAVES:
        return _LEAVES[key]
    stack, _, rest = key.partition(".")
    if stack in ("blocks", "vace_blocks"):
        number, _, rest = rest.partition(".")
        if rest == "modulation":
            return f"{stack}.{number}.scale_shift_table"
        module, _, leaf = rest.rpartition(".")
        return f"{stack}.{number}.{_INNER[module]}.{leaf}" if module in _INNER else None
    module, _, leaf = key.rpartition(".")
    return f"{_OUTER[module]}.{leaf}" if module in _OUTER else None


def _settings(weights: Mapping[str, Weight], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the settings from shapes; the number of heads and the norms' epsilon are stated or Wan's.

    Raises:
        ValueError: weights are missing from which they are inferred, or the number of heads is unknown.
    """
    shapes = Shapes("transformer", weights)
    dim, channels, *patch = shapes.of("patch_embedding.weight", 5)
    heads = _heads(dim, stated)
    settings: dict[str, Any] = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": patch,
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": shapes.of("proj_out.weight", 2)[0] // math.prod(patch),
        "text_dim": shapes.of("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        "freq_dim": shapes.of("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        "ffn_dim": shapes.of("blocks.0.ffn.net.0.proj.weight", 2)[0],
        "num_layers": shapes.count("blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in shapes else None,
        "eps": _stated(stated, "eps", 1e-6),
        "rope_max_seq_len": _stated(stated, "rope_max_seq_len", 1024),
    }
    if f"{_IMAGE}.norm1.weight" in shapes:
        settings["image_dim"] = shapes.of(f"{_IMAGE}.norm1.weight", 1)[0]
        settings["added_kv_proj_dim"] = shapes.of("blocks.0.attn2.add_k_proj.weight", 2)[1]
    if f"{_IMAGE}.pos_embed" in shapes:
        settings["pos_embed_seq_len"] = shapes.of(f"{_IMAGE}.pos_embed", 3)[1]
    if "vace_patch_embedding.weight" in shapes:
        settings["_class_name"] = "WanVACETransformer3DModel"
        settings["vace_in_channels"] = shapes.of("vace_patch_embedding.weight", 5)[1]
        settings["vace_layers"] = _vace_layers(shapes.count("vace_blocks"), settings["num_layers"], stated)
    return settings


def _stated(stated: Mapping[str, Any], name: str, usual: float) -> float:
    """A number that is stated; Wan's own if none is."""
    given = stated.get(name)
    return given if isinstance(given, int | float) and not isinstance(given, bool) else usual


def _heads(dim: int, stated: Mapping[str, Any]) -> int:
    heads = stated.get("num_heads", stated.get("num_attention_heads"))
    if heads is None and dim % _HEAD_DIM == 0:
        heads = dim // _HEAD_DIM
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or dim % heads:
        raise ValueError(
            f"its transformer has {dim} channels, from which its number of heads does not follow; put Wan's "
            "config.json, which has num_heads, beside the file"
        )
    return heads


def _vace_layers(count: int, layers: int, stated: Mapping[str, Any]) -> list[int]:
    """Blocks that control is added to: as stated, or evenly spread, as in every published VACE."""
    given = stated.get("vace_layers")
    if isinstance(given, list) and len(given) == count and all(isinstance(one, int) for one in given):
        return given
    return list(range(0, layers, -(-layers // count)))[:count]
