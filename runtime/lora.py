"""LoRA: small weights that change what a model makes, merged into the transformer when it is loaded.

Merged weights cost nothing per step, and everything else (ranks, sharding, forecasts) is as without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from runtime.configs import Lora
from runtime.errors import BadRequestError

if TYPE_CHECKING:
    from runtime.wan import Transformer

_PARTS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")  # of names, in the formats that diffusers reads


def lora_digest(lora: Lora) -> str:
    """What the file holds and how much of it counts, as a word for a model's revision.

    Raises:
        BadRequestError: there is no such file, or it holds no LoRA.
    """
    path = Path(lora.file)
    try:
        with safe_open(path, framework="pt") as content:  # checks that the header covers the file exactly
            names = list(content.keys())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except (OSError, SafetensorError) as error:
        raise BadRequestError(f"lora: {lora.file!r} given; it cannot be read: {error}") from None
    if not any(part in name for name in names for part in _PARTS):
        first = names[0] if names else "nothing"
        raise BadRequestError(f"lora: {lora.file!r} given; it holds no LoRA weights, but {first} …")
    return f"lora:{digest}×{lora.scale:g}"


def merge_lora(model: Transformer, lora: Lora) -> None:
    """Add `scale` times the LoRA to the weights that it is for.

    Args:
        model: in any dtype, whole, on the CPU.

    Raises:
        BadRequestError: it is for another model.

    Source: diffusers' `WanLoraLoaderMixin`, which reads the formats, and its PEFT adapters, which merge them.
    """
    from diffusers import WanPipeline

    weights = WanPipeline.lora_state_dict(load_file(lora.file))
    _refuse_strangers(model, lora, weights)
    try:
        model.load_lora_adapter(weights, prefix="transformer", adapter_name="lora")
    except (RuntimeError, ValueError) as error:  # shapes that differ
        reason = str(error).strip().splitlines()[-1].strip()
        raise BadRequestError(f"lora: {lora.file!r} does not fit the model: {reason}") from None
    model.fuse_lora(lora_scale=lora.scale, adapter_names=["lora"])
    model.unload_lora()


def _refuse_strangers(model: Transformer, lora: Lora, names: Iterable[str]) -> None:
    """Every weight must be for a module that the model has; diffusers would pass over others in silence."""
    modules = {f"transformer.{name}" for name, _ in model.named_modules()}
    strangers = [name for name in names if name.partition(".lora_")[0].removesuffix(".alpha") not in modules]
    if strangers:
        raise BadRequestError(
            f"lora: {lora.file!r} does not fit the model: it has no {strangers[0].partition('.lora_')[0]} "
            f"({len(strangers)} weights are for what it does not have)"
        )
