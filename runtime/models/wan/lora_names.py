"""Names of weights in LoRA files: prefixes that trainers leave out, and differences of whole weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from runtime.models.wan.layouts.transformer import renamed

PREFIXES = ("transformer.", "diffusion_model.", "lora_unet_")
_WRAPPER = "base_model.model."  # of PEFT's own files
_COMFY = "model.diffusion_model."
_OWN = re.compile(r"\.(self_attn|cross_attn)\.|\.ffn\.[02]\.")
_DIFFUSERS = re.compile(r"\.attn[12]\.|\.ffn\.net\.")
_DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ".modulation"}


def with_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give names without a prefix the one of their kind: Wan's own names, or diffusers'."""
    bare = {name.removeprefix(_WRAPPER): value for name, value in weights.items()}
    if any(name.startswith(_COMFY) for name in bare):
        return {name.removeprefix("model."): value for name, value in bare.items()}
    if any(name.startswith(PREFIXES) for name in bare):
        return bare
    kinds = {"diffusion_model.": _OWN, "transformer.": _DIFFUSERS}
    found = [prefix for prefix, kind in kinds.items() if any(kind.search(f".{name}") for name in bare)]
    blocks = all(name.startswith("blocks.") or renamed(_whole(name)) is not None for name in bare)
    prefix = found[0] if len(found) == 1 and blocks else ""
    return {prefix + name: value for name, value in bare.items()}


def _whole(name: str) -> str:
    """Name of the weight that a matrix of a pair, or a difference, belongs to."""
    for part in (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up."):
        if part in name:
            return name.partition(part)[0] + ".weight"
    module, _, leaf = name.rpartition(".")
    return module + _DIFFERENCES.get(f".{leaf}", f".{'weight' if leaf == 'alpha' else leaf}")


def difference_of(name: str) -> str | None:
    """Parameter in diffusers that a difference is added to as a whole; None if it is none, or of none.

    lightx2v and others store them for norms (`diff`), biases (`diff_b`) and modulations (`diff_m`).
    """
    bare = name.removeprefix("diffusion_model.")
    if bare == name:
        return None
    return next(
        (renamed(bare.removesuffix(end) + leaf) for end, leaf in _DIFFERENCES.items() if bare.endswith(end)),
        None,
    )
