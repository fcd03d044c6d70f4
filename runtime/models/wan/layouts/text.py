"""UMT5, Wan's text encoder, in other layouts: under the names of Wan's own code, or under transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.models.layouts.plain import plain, prefix_of, rename_all
from runtime.models.layouts.stored import Stored
from runtime.models.layouts.weights import Component, Shapes, Weight, check_names

_PREFIXES = (
    "", "text_encoder.", "text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.",
    "cond_stage_model.umt5xxl.transformer.", "cond_stage_model.",
)  # fmt: skip
_OWN, _TRANSFORMERS = "blocks.0.ffn.gate.0.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
_OUTER = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_INNER = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_TIED = "encoder.embed_tokens.weight"  # the same as `shared.weight`


def find_text_encoder(tensors: Mapping[str, Stored]) -> Component | None:
    """Find a UMT5 encoder among the tensors of a file.

    Returns:
        The encoder, named `text_encoder`; None if there is none.

    Raises:
        ValueError: it has weights that UMT5 does not have, or lacks some.
    """
    own = prefix_of(tensors, _PREFIXES, _OWN)
    prefix = prefix_of(tensors, _PREFIXES, _TRANSFORMERS) if own is None else own
    if prefix is None:
        return None
    weights = plain(tensors, prefix)
    if own is not None:
        weights = rename_all(weights, _renamed, prefix, "text encoder", "UMT5 does")
    weights = {name: one for name, one in weights.items() if not name.startswith(("decoder.", "lm_head."))}
    tied = weights.pop(_TIED, None)
    if tied is not None:
        weights.setdefault("shared.weight", tied)
    settings = _settings(weights)
    layers = [
        f"encoder.block.{n}.{module}.weight"
        for n in range(settings["num_layers"])
        for module in _INNER.values()
    ]
    check_names("text encoder", weights, [*_OUTER.values(), *layers])
    return Component("text_encoder", settings, weights)


def _renamed(key: str) -> str | None:
    if key in _OUTER:
        return _OUTER[key]
    stack, _, rest = key.partition(".")
    number, _, rest = rest.partition(".")
    module, _, leaf = rest.rpartition(".")
    return (
        f"encoder.block.{number}.{_INNER[module]}.{leaf}" if stack == "blocks" and module in _INNER else None
    )


def _settings(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Infer the settings from shapes.

    Raises:
        ValueError: weights are missing from which they are inferred, or only the first layer has positions.
    """
    shapes = Shapes("text encoder", weights)
    layers, first = shapes.count("encoder.block"), "encoder.block.0.layer"
    vocabulary, width = shapes.of("shared.weight", 2)
    positions = "layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = shapes.of(f"encoder.block.0.{positions}", 2)
    if f"encoder.block.{layers - 1}.{positions}" not in shapes:
        raise ValueError("its text encoder is a T5 with shared positions; Wan's is UMT5")
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes.of(f"{first}.0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": shapes.of(f"{first}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
    }
